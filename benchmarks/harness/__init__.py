"""What the benchmarks and recordings share.

`contest`: contenders in processes of their own, timed step by step in turn.
`recording`: rows of a CSV file, from which an interrupted recording goes on.
`statistics`: ratios and means with their intervals.
`page`: Markdown tables, and the line that says what ran on what.
"""
