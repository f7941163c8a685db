"""Keepers: which pictures stay, so that each one that goes has a twin that stays.

The kept pictures are the lexicographically first maximal independent set of the graph of similar
pairs under the declared order: go through the pictures from best to worst, and keep each one that
is similar to none kept so far. Connected components would remove pictures that are like nothing
that stays (594 of 4,265 on real pictures); here every removed one has a kept neighbour. The set
is unique, so neither the order of arrival nor that of the edges matters.

It is computed in rounds (Blelloch, Fineman and Shun, Greedy sequential maximal independent set
and matching are parallel on average, SPAA 2012): few of them, except on long chains in order.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def declared_order(
    level: npt.NDArray[np.int8],
    num_pixels: Ints,
    num_bytes: Ints,
    priority: Ints,
    key: npt.NDArray[np.void],
) -> Ints:
    """Return the rows from best to worst.

    The lower level comes first, then more pixels, more bytes, the lower priority number, the lower
    key (dtype V16).
    """
    return np.asarray(np.lexsort((key.view("S16"), priority, -num_bytes, -num_pixels, level)))


def choose_keepers(num_pictures: int, better: Ints, worse: Ints) -> Bools:
    """Return which pictures are kept.

    Pictures are numbered by the declared order, 0 the best; edge i joins ``better[i]`` and
    ``worse[i]``, the lower number first.
    """
    kept = np.ones(num_pictures, np.bool_)
    while len(better):
        # A picture with no better undecided neighbour stays, and its neighbours go.
        contested = np.zeros(num_pictures, np.bool_)
        contested[worse] = True
        settled = ~contested[better]
        kept[worse[settled]] = False
        undecided = kept[better] & kept[worse] & ~settled
        better, worse = better[undecided], worse[undecided]
    return kept


def nearest_keepers(
    kept: Bools, better: Ints, worse: Ints, similarity: npt.NDArray[np.float32]
) -> tuple[Ints, Ints]:
    """Choose for each removed picture the most similar of its better kept neighbours.

    There is always one; of equally similar ones the best is chosen, of two edges to it the first.
    Returns for each picture its keeper (itself if it is kept) and the edge that joins them (-1 if
    it is kept).
    """
    edges = np.flatnonzero(kept[better] & ~kept[worse])
    order = edges[np.lexsort((better[edges], -similarity[edges], worse[edges]))]
    removed, first = np.unique(worse[order], return_index=True)
    keeper, joining = np.arange(len(kept)), np.full(len(kept), -1)
    keeper[removed], joining[removed] = better[order[first]], order[first]
    return keeper, joining
