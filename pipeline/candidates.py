"""The pictures that a mixture could take, counted and reduced to their hashes, in parallel.

A mixture takes the N pictures of a dataset with the smallest hash of (seed, key). Which N these are
needs no sort: pass one, a stage, judges the pictures of each group of shards and publishes the
hashes of those that could be taken; then the N-th smallest hash of all is found by reading these
small files one after the other. It is the bound below which pass two, whoever it is (the shard
writer, a captioner), takes what it sees. So a smaller choice is a part of a larger one, and one
dataset's choice does not depend on another's.
"""

import pyarrow as pa

CANDIDATES = pa.schema([("hash", pa.uint64()), ("held_out", pa.bool_())])
"""One picture that could be taken, in order of the hashes: that of
:func:`pipeline.eligible.selection_hash`, and whether it is held out for validation."""
