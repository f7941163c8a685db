"""`evenmix plan`: arithmetic that was checked by hand, ranges in order, and what runs have used."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.config_file import configure
from pipeline.dataflow import Command
from pipeline.errors import EvenmixError
from pipeline.plan.expected import expect
from pipeline.plan.figures import COSTS, Figures, load_figures
from pipeline.plan.machines import Machine, machine_of
from pipeline.plan.model import StagePlan, Work, stages
from pipeline.plan.price import all_of, price
from pipeline.plan.ranges import NOTHING, Range
from pipeline.plan.tables import span
from pipeline.plan.used import seconds_of_trial, used, with_pictures_of_trial
from pipeline.presets import PRESETS
from pipeline.recipe import Recipe, preset_recipe
from pipeline.summary import Summary
from pipeline.usage import read_runs
from tests import corpora

RECIPE: Mapping[str, Any] = {
    "root": "corpus",
    "datasets": {"own": {"layout": "webdataset", "source": "own/*.tar", "licence": "CC0 1.0"}},
    "captions": {"own": {"engine": "source"}},
    "mixture": {"name": "m", "resolution": 512, "captions": "own"},
}
RECORDS = {"own": 10_000}
Values = Mapping[str, float | tuple[float, float]]
OWN: Values = {"picture_mb.own": 1, "ingest.kept_of_own": 0.5}
"""10,000 records of 1 MB, of which 5,000 are kept: 10 GB are 38 shards of at most 256 MiB."""


def recipe_of(**tables: Any) -> Recipe:
    return configure("the test", {**RECIPE, **tables}, Recipe, {})


def figures_of(values: Values) -> Figures:
    """Return figures that are all zero but these, by dotted name."""
    document = tomllib.loads(COSTS.read_text(encoding="utf-8"))

    def figured(table: dict[str, Any], prefix: str) -> dict[str, Any]:
        if "source" in table:
            value = left.pop(prefix, 0)
            low, high = value if isinstance(value, tuple) else (value, value)
            return {"low": low, "high": high, "source": "the test"}
        return {key: figured(t, f"{prefix}.{key}".lstrip(".")) for key, t in table.items()}

    document["picture_mb"]["own"] = {"source": "the test"}
    left = dict(values)
    figures = Figures.model_validate(figured(document, ""))
    assert not left
    return figures


def plans_of(
    recipe: Recipe,
    figures: Figures,
    records: Mapping[str, int] = RECORDS,
    measured: Mapping[Command, float] | None = None,
) -> dict[str, StagePlan]:
    expected = expect(recipe, figures, records, is_fresh=True)
    return {plan.name: plan for plan in stages(recipe, figures, expected, measured)}


def test_ingest_and_its_price() -> None:
    recipe = recipe_of(resources={"ingest": {"workers": 3, "disk_gb": 100}})
    figures = figures_of(
        {
            **OWN,
            "machines.vcpu_s_per_measured_s": 2,
            "machines.waste": 1.2,
            "machines.start_s": 300,
            "machines.listings_per_hour": (600, 1e6),
            "machines.internet_s_per_mb": 0.1,
            "ingest.cpu_s_per_record": 0.5,
            "ingest.cpu_s_per_mb": 1,
            "ingest.bytes_per_picture": 1000,
            "prices.vcpu_hour": 0.05,
            "prices.memory_gb_hour": 0.01,
            "prices.disk_gb_hour": 0.001,
            "prices.class_a_thousand": 10,
            "prices.class_b_thousand": 1,
            "prices.stored_gb_month": 0.02,
        }
    )
    plan = plans_of(recipe, figures)["ingest"]
    assert plan.machine == Machine("n2-standard-4", 4, 16, 0, 100, 3, threads=1)
    assert plan.items == 38
    # Of 10,000 records 0.5 s each and of 5,000 MB 1 s each, on slower vCPUs; 10,000 MB to download.
    assert plan.work.worker_s == Range.exactly(2 * (5000 + 5000) + 1000)
    assert plan.work.pictures == Range.exactly(10_000)
    assert plan.work.downloaded_bytes == Range.exactly(10e9)
    assert plan.work.stored_bytes == Range.exactly(5000 * 1_001_000)
    assert plan.work.class_a == Range.exactly(38 * 4)
    assert plan.work.class_b == Range.exactly(38 * 5)
    bill = price(plan, figures)
    # 21,000 s on 4 vCPUs, with waste 6,300 s of machines; three of them start, 900 s.
    assert bill.workers == 3
    assert bill.hours.low == pytest.approx(2 / 3)
    assert bill.vcpu_hours.low == pytest.approx(8)
    assert bill.machines_usd.low == pytest.approx(2 * (4 * 0.05 + 16 * 0.01 + 100 * 0.001))
    # In 40 minutes 400 listings are class A, too; of one page there is at most one a second.
    assert bill.requests_usd.low == pytest.approx(1.52 + 4 + 0.19)
    assert bill.requests_usd.high == pytest.approx(1.52 + 24 + 0.19)
    assert bill.usd.low == pytest.approx(0.92 + 5.71)
    assert bill.usd_month.low == pytest.approx(5000 * 1_001_000 / 2**30 * 0.02)
    assert all_of([bill, bill]).usd.high == pytest.approx(2 * 26.63)


def test_downloads_wait_for_their_servers() -> None:
    urls = {"layout": "url_list", "source": "urls.parquet", "licence": "CC0 1.0"}
    rules = {"id_rule": "{url}", "image_url": "{url}"}
    recipe = recipe_of(datasets={"own": {**urls, **rules}})
    waits: Values = {"ingest.download_s": (0.4, 0.8), "ingest.hosts": (1, 2)}
    plan = plans_of(recipe, figures_of({**OWN, **waits}))["ingest"]
    # 8 at a time from a host: of two hosts at best, of one at worst.
    assert plan.work.worker_s == Range(4000 / 16, 8000 / 8)
    assert plan.items == 20  # 10,000 records, 512 a shard
    assert plan.work.downloaded_bytes == Range.exactly(5e9)
    busy = {"ingest.cpu_s_per_record": 0.05, "machines.vcpu_s_per_measured_s": 1}
    plan = plans_of(recipe, figures_of({**OWN, **waits, **busy}))["ingest"]
    assert plan.work.worker_s == Range(500, 1000)


def test_embed() -> None:
    figures: Values = {
        **OWN,
        "machines.vcpu_s_per_measured_s": (1, 2),
        "machines.bucket_s_per_mb": 0.01,
        "embed.cpu_s_per_picture.sscd": 2,
        "embed.cpu_s_per_mb": 0.1,
        "embed.bytes_per_picture": 1000,
    }
    work = plans_of(recipe_of(), figures_of(figures))["embed"].work
    assert work.worker_s == Range(10_500 + 50, 21_000 + 50)
    assert work.read_bytes == Range.exactly(5e9)
    assert work.written_bytes == work.stored_bytes == Range.exactly(5e6)
    assert work.class_b == Range.exactly(5000 / 16 + 38 * 5)
    datasets = {"own": {**RECIPE["datasets"]["own"], "duplicates": "exact"}}
    assert plans_of(recipe_of(datasets=datasets), figures_of(figures))["embed"].work == Work()


def test_dedup_grows_as_its_clusters_say() -> None:
    figures = figures_of(
        {
            **OWN,
            "ingest.kept_of_own": 1,
            "machines.vcpu_s_per_measured_s": 1,
            "dedup.cpu_s_per_million_products": 1,
            "dedup.uneven_clusters": 2,
            "dedup.alone_s_per_picture": 1e-4,
        }
    )
    # HiDream-I1's 16,000 clusters, four times: members 2.56e12 products, pairs twice 0.8e12,
    # fitting 125 vectors a cluster in 10 rounds 0.32e12, of which one is what the others wait for.
    # A fit's 14 GB are more than a vCPU's share, so that it has a machine of 8 vCPUs.
    plan = plans_of(recipe_of(), figures, {"own": 160_000_000})["dedup"]
    assert plan.work.worker_s.high == pytest.approx(4 * (2.56e6 + 1.6e6) + 3 * 8 * 0.32e6)
    assert plan.work.alone_s.high == pytest.approx(0.32e6 + 16_000)
    # All pictures at once take 400 bytes each, more than a machine of the search has.
    assert plan.machine.machine_type == "n2-highmem-8"
    assert plan.machine_alone.machine_type == "n2-highmem-16"
    # Few pictures are compared each with each.
    small = plans_of(recipe_of(), figures, {"own": 1000})["dedup"].work
    assert small.worker_s.high == pytest.approx(2 * 1000**2 / 2 / 1e6)


def test_captions_of_a_model() -> None:
    vllm = {"engine": "vllm", "captions_per_image": 2, "max_tokens": 100}
    figures = figures_of(
        {
            **OWN,
            "caption.tokens_per_caption": (80, 200),
            "caption.tokens_per_gpu_s": (100, 400),
            "caption.server_start_s": 600,
            "caption.bytes_per_caption": 10,
            "machines.waste": 1,
            "prices.l4_hour": 1,
            "dedup.kept_near": 1,
        }
    )
    recipe = recipe_of(captions={"own": vllm})
    plan = plans_of(recipe, figures)["caption"]
    assert plan.machine.machine_type == "g2-standard-8"
    # 10,000 captions of 80 to 100 tokens, since the recipe allows no more.
    assert plan.work.gpu_s == Range(800_000 / 400, 1_000_000 / 100)
    assert plan.items == 38
    assert plan.work.stored_bytes == Range.exactly(100_000)
    assert plan.work.class_b == Range.exactly(5000 + 38 * 5)
    bill = price(plan, figures)
    # A machine works at 4 of 38 items at a time, whatever its vCPUs.
    assert bill.workers == 10
    assert bill.machines_usd.low == pytest.approx((2000 + 10 * 600) / 3600)

    two = {"accelerator": "type:nvidia-l4;count:2;install-nvidia-driver"}
    twice = plans_of(recipe_of(captions={"own": {**vllm, **two}}), figures)["caption"]
    assert twice.machine.gpus == 2
    assert twice.work.gpu_s == plan.work.gpu_s
    selected = {**vllm, "pictures": "selected"}
    mixture = {**RECIPE["mixture"], "images_per_dataset": 1000}
    few = plans_of(recipe_of(captions={"own": selected}, mixture=mixture), figures)["caption"]
    assert few.work.pictures.low == pytest.approx(1100)
    served = recipe_of(captions={"own": {**vllm, "endpoint": "http://host:8000/v1"}})
    assert plans_of(served, figures)["caption"].work.gpu_s == NOTHING
    t4 = recipe_of(captions={"own": {**vllm, "accelerator": "type:nvidia-tesla-t4;count:1"}})
    with pytest.raises(EvenmixError, match="no accelerator but the L4, and caption has 'type:nvid"):
        plans_of(t4, figures)
    cpu = recipe_of(captions={"own": vllm}, resources={"caption": {"machine_type": "e2-highcpu-2"}})
    with pytest.raises(EvenmixError, match=r"e2-highcpu-2 has none; set resources\.caption"):
        plans_of(cpu, figures)


def test_mix() -> None:
    figures = figures_of(
        {
            **OWN,
            "machines.vcpu_s_per_measured_s": 1,
            "dedup.kept_near": 0.8,
            "mix.large_enough": 0.5,
            "mix.cpu_s_per_mpx": 1,
            "mix.bytes_per_pixel.png": 1,
        }
    )
    mixture = {**RECIPE["mixture"], "samples_per_shard": 100}
    work = plans_of(recipe_of(mixture=mixture), figures)["mix"].work
    # Of 5,000 pictures 4,000 are no duplicates, half of them large enough. Tars are read whole.
    samples = 2000 * 512 * 512
    assert work.pictures == Range.exactly(2000)
    assert work.worker_s.low == pytest.approx(samples / 1e6)
    assert work.read_bytes == Range.exactly(5e9 + samples)
    assert work.written_bytes == Range.exactly(2 * samples)
    assert work.stored_bytes == Range.exactly(samples)
    # Few are read one by one.
    few = recipe_of(mixture={**mixture, "images_per_dataset": 400})
    work = plans_of(few, figures)["mix"].work
    assert work.read_bytes == Range.exactly(400e6)
    assert work.written_bytes == Range.exactly(400 * 512 * 512)


def test_the_full_corpus_has_162_9_million_pictures() -> None:
    expected = expect(preset_recipe("i1-256", "corpus"), load_figures(), {}, is_fresh=True)
    assert len(expected) == 11
    assert sum(dataset.kept.high for dataset in expected.values()) == 162_903_264
    assert expected["yfcc"].records.high == 99_171_688
    assert expected["fluxreason"].picture_bytes == Range(0.13e6, 0.14e6)
    assert expected["textatlas"].picture_bytes.high == 1_200_000_000_000 / 5_398_826


@pytest.mark.parametrize("preset", PRESETS)
def test_lows_are_not_above_highs(preset: str) -> None:
    figures = load_figures()
    for plan in plans_of(preset_recipe(preset, "corpus"), figures, {}).values():
        bill = price(plan, figures)
        numbers = [getattr(plan.work, field.name) for field in fields(Work)]
        for number in [*numbers, bill.hours, bill.vcpu_hours, bill.usd, bill.usd_month]:
            assert 0 <= number.low <= number.high
        assert bill.usd.low > 0


def test_more_records_take_more_of_everything() -> None:
    recipe, figures = recipe_of(), load_figures()
    less, more = (plans_of(recipe, figures, {"own": n}) for n in (30_000, 3_000_000))
    for stage, plan in more.items():
        for field in fields(Work):
            small, large = (getattr(p.work, field.name) for p in (less[stage], plan))
            assert small.low <= large.low
            assert small.high <= large.high
        assert price(less[stage], figures).usd.high < price(plan, figures).usd.high


@pytest.mark.parametrize(
    ("machine_type", "vcpus", "memory_gb", "gpus"),
    [
        ("n2-standard-4", 4, 16, 0),
        ("n2-highmem-8", 8, 64, 0),
        ("n1-highmem-2", 2, 13, 0),
        ("e2-highcpu-16", 16, 16, 0),
        ("c3-highcpu-22", 22, 44, 0),
        ("g2-standard-8", 8, 32, 1),
        ("g2-standard-96", 96, 384, 8),
    ],
)
def test_machine_types(machine_type: str, vcpus: int, memory_gb: float, gpus: int) -> None:
    machine = Machine(machine_type, vcpus, memory_gb, gpus, 50, 9, 2)
    assert machine_of(machine_type, 50, 9, 2) == machine
    assert machine.slots == (2 if gpus else 2 * vcpus)
    assert machine.used_by(1) == 1
    assert machine.used_by(2 * machine.slots + 1) == 3
    assert machine.used_by(1_000_000) == 9


@pytest.mark.parametrize("machine_type", ["a3-highgpu-8g", "g2-standard-10", "g2-highmem-8", "n2"])
def test_machine_types_that_cannot_be_priced(machine_type: str) -> None:
    with pytest.raises(EvenmixError, match="cannot price the machine type"):
        machine_of(machine_type, 50, 1, 1)


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (Range(1.92, 28.4), "", "1.9-28"),
        (Range(196.4, 1016), "", "200-1,000"),
        (Range(2440, 13_800), "", "2.4-14 k"),
        (Range(19.06e12, 45.6e12), "B", "19-46 TB"),
        (Range(0.9e9, 1.1e12), "B", "0-1.1 TB"),
        (Range(0.01, 0.063), "", "0.01-0.06"),
        (Range(1.5, 1.52), "", "1.5"),
        (Range.exactly(344_872), "", "344,872"),
        (Range.exactly(162_903_264), "", "163 M"),
        (Range.exactly(1_151_234), "B", "1.15 MB"),
        (Range.exactly(0.00191), "", "0.0019"),
        (NOTHING, "B", "0 B"),
    ],
)
def test_numbers_for_people(number: Range, unit: str, text: str) -> None:
    assert span(number, unit) == text


def test_figures_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text('[prices]\nvcpu_hour = { low = 0.01, high = 0.02, source = "contract" }\n')
    figures = load_figures(str(own))
    assert figures.prices.vcpu_hour.range == Range(0.01, 0.02)
    assert figures.prices.memory_gb_hour == load_figures().prices.memory_gb_hour
    own.write_text('[picture_mb]\nmine = { low = 1, high = 2, source = "guess" }\n')
    assert set(load_figures(str(own)).picture_mb) == {*load_figures().picture_mb, "mine"}


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (
            'vcpu_hours = { low = 1, high = 1, source = "s" }',
            r"prices\.vcpu_hours: unknown key; did you mean 'vcpu_hour'\?",
        ),
        ('vcpu_hour = { low = 2, high = 1, source = "s" }', "low = 2 is above high = 1"),
        ("vcpu_hour = { low = 1, high = 1 }", r"prices\.vcpu_hour\.source: Field required"),
        ('vcpu_hour = { low = -1, high = 1, source = "s" }', r"prices\.vcpu_hour\.low"),
    ],
)
def test_wrong_figures_are_refused(tmp_path: Path, text: str, mistake: str) -> None:
    own = tmp_path / "mine.toml"
    own.write_text(f"[prices]\n{text}\n")
    with pytest.raises(EvenmixError, match=mistake) as error:
        load_figures(str(own))
    assert str(error.value).startswith(f"{own} has 1 mistake")


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a small corpus whose ingest has run, with two workers."""
    folder = tmp_path_factory.mktemp("ingested")
    corpora.write_sources(folder / "sources")
    recipe = corpora.write_recipe(folder, folder / "sources")
    corpora.finish(corpora.evenmix("ingest", str(recipe), "--workers=2"))
    return recipe


def small_recipe(ingested: Path) -> Recipe:
    return configure("the test", tomllib.loads(ingested.read_text()), Recipe, {})


def test_what_is_done_is_counted_and_costs_nothing_more(ingested: Path) -> None:
    recipe, figures = small_recipe(ingested), load_figures()
    expected = expect(recipe, figures, {})
    for name, (read, rejected) in corpora.COUNTS.items():
        assert expected[name].records == Range.exactly(read)
        assert expected[name].kept == Range.exactly(read - sum(rejected.values()))
        summary = ingested.parent / "corpus/images" / name / "stage.json"
        shards = Summary.from_json(summary.read_bytes()).items
        assert expected[name].shards == Range.exactly(len(shards))
    ingest, embed, *_ = stages(recipe, figures, expected)
    assert ingest.work == Work()
    assert price(ingest, figures).usd == price(ingest, figures).usd_month == NOTHING
    assert embed.work.pictures == Range.exactly(10)
    with pytest.raises(EvenmixError, match="--records lines=N --records photographs=N --records s"):
        expect(recipe, figures, {}, is_fresh=True)


def test_what_was_used_stands_beside_the_plan(
    ingested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, figures = small_recipe(ingested), load_figures()
    expected = expect(recipe, figures, {})
    whole = {name: replace(e, finished=frozenset()) for name, e in expected.items()}
    plans = stages(recipe, figures, whole)
    found = used(recipe, plans, figures)
    assert found.keys() == {"ingest"}
    (run,) = read_runs(recipe.root)
    files = [p for p in (ingested.parent / "corpus/images").rglob("*") if p.is_file()]
    ingest = found["ingest"]
    assert ingest.pictures == 69 == plans[0].work.pictures.high
    assert ingest.vcpu_hours == run.hours * 2
    assert ingest.stored_bytes == sum(path.stat().st_size for path in files)
    vcpu_and_memory = 0.056 + 4 * 0.003557 + 50 / 4 * 0.000054
    assert ingest.usd
    assert ingest.usd.low == pytest.approx(run.hours * 2 * vcpu_and_memory)
    assert ingest.usd_month.low == pytest.approx(ingest.stored_bytes / 2**30 * 0.02)
    assert ingest.was_local
    assert cli.main(["plan", str(ingested)]) == 0
    assert "runs on this machine have none to start" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("machine_type", "threads", "vcpus"),
    [
        ("n2-standard-4", 1, 3 * 4),  # four at a time: three machines for nine items
        ("g2-standard-8", 4, 3 * 8),
        ("n2-standard-16", 1, 16),
        ("a2-highgpu-1g", 4, None),
        (None, 1, None),
    ],
)
def test_machines_of_dataflow_are_used_as_far_as_there_are_items(
    ingested: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    machine_type: str | None,
    threads: int,
    vcpus: int | None,
) -> None:
    recipe, figures = small_recipe(ingested), load_figures()
    (run,) = read_runs(recipe.root)
    of_job = replace(
        run, runner="dataflow", items=9, workers=50, machine_type=machine_type, threads=threads
    )
    notes = tmp_path / "notes/runs"
    notes.mkdir(parents=True)
    (notes / "ingest-1.json").write_text(json.dumps(asdict(of_job)))
    elsewhere = recipe.model_copy(update={"root": str(tmp_path)})
    records = dict.fromkeys(recipe.datasets, 100)
    plans = stages(elsewhere, figures, expect(elsewhere, figures, records))
    ingest = used(elsewhere, plans, figures)["ingest"]
    assert ingest.vcpu_hours == (None if vcpus is None else run.hours * vcpus)
    assert (ingest.usd is None) == (vcpus is None)
    assert not ingest.was_local
    given = [f"--records={name}=100" for name in recipe.datasets]
    assert cli.main(["plan", str(ingested), f"--root={tmp_path}", *given]) == 0
    line = next(
        text for text in capsys.readouterr().out.splitlines() if text.split()[:1] == ["used"]
    )
    assert ("unknown" in line) == (vcpus is None)


def test_a_trial_replaces_figures(ingested: Path) -> None:
    root = str(ingested.parent / "corpus")
    (run,) = read_runs(root)
    measured = seconds_of_trial(root)
    assert measured == {"ingest": run.hours * 3600 * 2 / 69}
    figures = figures_of({**OWN, "machines.vcpu_s_per_measured_s": (1, 3)})
    work = plans_of(recipe_of(), figures, measured=measured)["ingest"].work
    seconds = measured["ingest"] * 10_000
    assert work.worker_s == Range(seconds, 3 * seconds)
    tars = sum(path.stat().st_size for path in Path(root, "images/shapes").glob("*.tar"))
    replaced = with_pictures_of_trial(load_figures(), root, ["shapes", "elsewhere"])
    assert replaced.picture_mb.keys() == {*load_figures().picture_mb, "shapes"}
    assert replaced.picture_mb["shapes"].low == pytest.approx(tars / 32 / 1e6)
    with pytest.raises(EvenmixError, match="has no notes of runs on this machine"):
        seconds_of_trial(str(ingested.parent / "sources"))


def test_the_command(ingested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(ingested), "--explain"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.split()[:3] == ["ingest", "planned", "69"] for line in lines)
    assert any(line.split()[:2] == ["used", "69"] for line in lines)
    assert "machines.vcpu_s_per_measured_s" in printed


def test_the_command_without_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "corpus")
    assert cli.main(["plan", "--preset", "i1-256", "--root", root]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert "145-163 M" in next(line for line in printed.splitlines() if "dedup" in line)
    assert rows["all"]
    assert "places365-challenge2016, yfcc (577 GB)" in printed
    assert not Path(root).exists()


def test_a_model_that_does_not_fit_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'root = "{tmp_path}/corpus"\n[mixture]\npreset = "i1-1024"\ncaptions = "own"\n'
        '[captions.own]\nengine = "vllm"\n'
    )
    assert cli.main(["plan", str(path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "has 31 GB of weights, but g2-standard-8 24 GB of GPU memory" in printed
    text = path.read_text() + 'accelerator = "type:nvidia-l4;count:2;install-nvidia-driver"\n'
    path.write_text(text)
    assert cli.main(["plan", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "g2-standard-24" in printed
    assert "GB of weights" not in printed
    assert "for less" not in printed
    text = text.replace('captions = "own"', "captions = { own = 1, theirs = 1 }")
    path.write_text(f'{text}[captions.theirs]\nengine = "source"\n')
    assert cli.main(["plan", str(path)]) == 0
    assert "Caption sets that no model writes are priced on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "r"], "name a recipe, or --preset NAME with --root R"),
        (["--preset", "i1-256"], "--preset needs --root R"),
        (["--preset", "i1-25", "--root", "r"], "did you mean 'i1-256'?"),
        (["--preset", "i1-256", "--root", "r", "--records", "yfc=3"], "did you mean 'yfcc'?"),
        (["--preset", "i1-256", "--root", "r", "--records", "yfcc"], "say DATASET=N"),
        (["--preset", "i1-256", "--root", "r", "--costs", "no.toml"], "no.toml does not exist"),
        (["--preset", "i1-256", "--root", "r", "--measured", "no"], "no has no notes of runs"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err
