"""TFRecords checked with TensorFlow and TFDS, in the versions that i1's trainers pin.

    python -m tests.benchmarks.tfds_check --tfds-python PATH_TO_A_PYTHON_WITH_TFDS.TXT

A small corpus is built, mixed and exported with the commands that a user would type, once to
squares as PNG and once with the aspect kept as JPEG. Then the other Python reads the folders as
i1's trainers do and compares every sample with the tars of the mixture (tfds_reader.py).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import corpora

MIXTURES = {
    "squares": 'crop = "square"\nimage_format = "png"',
    "whole": 'crop = "none"\nimage_format = "jpeg"',
}


def main() -> int:
    """Run the check; returns 1 if something is not read as it was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tfds-python", required=True, metavar="PATH")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tfds-check-") as name:
        folder = Path(name)
        corpora.write_sources(folder / "sources")
        recipe = corpora.write_recipe(folder, folder / "sources")
        text = recipe.read_text(encoding="utf-8")
        for mixture, settings in MIXTURES.items():
            recipe.write_text(
                text.replace('name = "small"', f'name = "{mixture}"\n{settings}'), encoding="utf-8"
            )
            corpora.finish(corpora.evenmix("build", str(recipe)))
            corpora.finish(corpora.evenmix("tfrecords", str(recipe)))
        corpora.finish(corpora.evenmix("verify", str(folder / "corpus")))
        reader = Path(__file__).with_name("tfds_reader.py")
        read = [options.tfds_python, str(reader), str(folder / "corpus"), *MIXTURES]
        return subprocess.run(read, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
