"""The graph of a functional model: its calls, its blocks, cuts through it.

What the rooms do with a transformer's blocks begins with `find_blocks`.

- `calls.py`: the calls of layers in a functional model; nested models opened;
- `blocks.py`: the blocks of a transformer;
- `segments.py`: the parts of a model between cuts, as layers;
- `cutting.py`: cuts a model; models of some of a model's blocks;
- `freezing.py`: layers frozen, and thawed as they were.
"""

from blogkeras.graph.blocks import Block, block_boundaries, find_blocks
from blogkeras.graph.calls import (
    Call,
    as_list,
    by_name,
    calls,
    copied,
    copied_layer,
    described_layer,
    input_like,
    is_functional,
    lasting_name,
    whole_model,
)
from blogkeras.graph.cutting import (
    calls_of_blocks,
    cut_model,
    keep_blocks,
    kinds_of_blocks,
    rearranged,
    spaced_blocks,
)
from blogkeras.graph.freezing import freeze, freeze_inside, thaw, thawed
from blogkeras.graph.segments import Cut, Segment, Untracked

__all__ = [
    "Block",
    "Call",
    "Cut",
    "Segment",
    "Untracked",
    "as_list",
    "block_boundaries",
    "by_name",
    "calls",
    "calls_of_blocks",
    "copied",
    "copied_layer",
    "cut_model",
    "described_layer",
    "find_blocks",
    "freeze",
    "freeze_inside",
    "input_like",
    "is_functional",
    "keep_blocks",
    "kinds_of_blocks",
    "lasting_name",
    "rearranged",
    "spaced_blocks",
    "thaw",
    "thawed",
    "whole_model",
]
