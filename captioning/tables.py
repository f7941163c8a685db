"""The table of a caption set: row-aligned with the image index, every picture with its outcome."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from captioning.outcomes import USABLE, CaptionOutcome
from pipeline.receipts import Counts
from pipeline.stage import Output

CAPTIONS = pa.schema(
    [
        ("key", pa.string()),
        (
            "captions",
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.string()),
                        ("outcome", pa.string()),
                        ("model", pa.string()),
                        ("prompt_kind", pa.string()),
                        ("prompt", pa.string()),
                        ("prompt_sha256", pa.string()),
                        ("seed", pa.int64()),
                        ("prompt_tokens", pa.int32()),
                        ("completion_tokens", pa.int32()),
                        ("asked", pa.timestamp("ms", tz="UTC")),
                        ("answer_s", pa.float32()),
                        ("detail", pa.string()),
                    ]
                )
            ),
        ),
    ]
)
"""The captions of one picture, by number; what concerns only a model is null for other engines.

``prompt`` is the exact text that went with the picture, ``prompt_sha256`` its hash; ``asked`` is
when it was sent and ``answer_s`` how long the answer took. A picture that was not asked for has one
caption without text."""


def caption_output(rows: Sequence[Mapping[str, Any]]) -> Output:
    """Count a picture by its first usable caption, or by the outcome of its first one."""
    outcomes: Counter[str] = Counter()
    for row in rows:
        found = [str(caption["outcome"]) for caption in row["captions"]]
        outcomes[CaptionOutcome.OK if USABLE.intersection(found) else found[0]] += 1
    captioned = outcomes.pop(CaptionOutcome.OK, 0)
    return Output(
        table=pa.Table.from_pylist(rows, schema=CAPTIONS),
        counts=Counts(len(rows), captioned, dict(sorted(outcomes.items()))),
    )
