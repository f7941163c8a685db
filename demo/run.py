"""`make demo`: the whole path on real pictures, command by command, and what came out of it.

Each step is the command that a user would give, shown before it runs.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mixing.manifest import load_manifest
from pipeline import storage
from pipeline.funnel import funnel_table
from pipeline.progress import console
from pipeline.recipe import load_recipe

OUTPUT = Path("demo-output")
# The command's defaults suit i1's model; with guidance 12 this one overshoots to glaring colours.
SAMPLING = "--guidance 4 --steps 50 --shift 1"
EXAMPLES_PER_DATASET = 3


def main() -> int:
    """Run the demo; returns the exit status of the first step that fails, or 0."""
    argparse.ArgumentParser(description="build, train and sample on real pictures").parse_args()
    started = time.monotonic()
    run, samples = OUTPUT / "run", OUTPUT / "samples"
    # What is shown is what a user would type; it runs with this environment's programs.
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for step in (
        f"python -m demo.sources {OUTPUT / 'sources'}",
        "evenmix build demo/recipe.toml",
        "evenmix train demo/train.toml",
        f"evenmix sample --checkpoint {run} --output {samples} "
        f"--prompts demo/prompts.txt {SAMPLING}",
    ):
        print(f"\n$ {step}", flush=True)
        environment = {**os.environ, "PATH": programs}
        status = subprocess.run(shlex.split(step), env=environment, check=False).returncode
        if status:
            return status
    recipe = load_recipe("demo/recipe.toml")
    mixture = storage.join(recipe.root, "mixtures", recipe.mixture.name)
    captions = OUTPUT / "captions.txt"
    captions.write_text("\n".join(example_captions(mixture)) + "\n", encoding="utf-8")
    print(f"\nThe demo took {time.monotonic() - started:.0f} s. What came out:\n", flush=True)
    console.print(funnel_table(recipe))
    print(captions.read_text(encoding="utf-8"))
    print(f"example captions   {captions}")
    print(f"licences           {OUTPUT / 'sources' / 'LICENCES.md'}")
    print(f"loss curve         {run / 'loss.png'}")
    print(f"grid of samples    {samples / 'grid.png'}")
    print(
        "\nThe captions are the datasets' own texts. On a machine with a GPU and evenmix[vllm]\n"
        "installed, Qwen3-VL captions the same pictures:\n"
        "  evenmix caption demo/recipe.toml --captions qwen3-vl"
    )
    return 0


def example_captions(mixture: str) -> Iterator[str]:
    """Read the first captions of each dataset from a mixture's shards, as a trainer does."""
    for dataset in load_manifest(mixture).datasets:
        shard = storage.join(mixture, dataset.train.shards[0].name)
        offsets = storage.read_parquet(shard.removesuffix(".tar") + ".parquet").to_pylist()
        for row in offsets[:EXAMPLES_PER_DATASET]:
            sample = json.loads(storage.read_bytes(shard, row["json_offset"], row["json_bytes"]))
            yield f"{dataset.name}: {sample['captions'][0]['text']}"


if __name__ == "__main__":
    sys.exit(main())
