"""What the benchmarks and recordings share.

`bert`: the model that several benchmarks train.
`command_line`: the options that they have in common.
`contest`: contenders in processes of their own, timed step by step in turn.
`recording`: rows of a CSV file, from which an interrupted recording goes on.
`statistics`: ratios and means with their intervals.
`page`: Markdown tables and sections, and what ran on what.
"""
