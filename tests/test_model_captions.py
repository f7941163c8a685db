"""A caption set from a model: what it is asked, what is stored, what is taken over and redone.

The engine is an endpoint whose answers each test decides; test_caption_run.py has the real one.
"""

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from captioning import from_model, model_set
from captioning.engine import conversation
from captioning.engine.client import Engine
from captioning.engine.models import ModelIdentity
from captioning.engine.questions import EngineConfig
from captioning.from_model import VllmCaptioning
from captioning.from_source import SourceCaptioning
from captioning.slices import SLICE_CAPTIONS
from mixing.select import Select
from pipeline import ingest, storage
from pipeline.beam_job import RunnerOptions
from pipeline.candidates import Candidates
from pipeline.errors import EvenmixError
from pipeline.receipts import Counts
from pipeline.recipe import Recipe, SourceCaptions, VllmCaptions
from pipeline.stage import Output, Stage, WorkItem
from pipeline.summary import Summary, finished_shards, read_shard
from tests import corpora
from tests.chat_server import ChatServer, Reply, prompt_of
from tests.stages import run_here

PICTURES, SHARDS = 32, 2
HERE = RunnerOptions(1, ())
Captions = dict[str, list[dict[str, Any]]]


def here(stage: Stage, items: list[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
    return run_here(stage, items)


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A recipe, as a document, whose corpus of 32 shapes in two shards is ingested."""
    monkeypatch.setattr(model_set, "run_stage", here)
    corpora.write_shapes(tmp_path / "shapes")
    document: dict[str, Any] = {
        "root": str(tmp_path / "corpus"),
        "seed": 5,
        "images": {"min_short_edge_px": 32},
        "datasets": {
            "shapes": {
                "layout": "webdataset",
                "source": str(tmp_path / "shapes" / "shapes-*.tar"),
                "licence": "CC0 1.0",
                "id_rule": "{id}",
                "text_field": "text",
                "duplicates": "exact",
            }
        },
        "captions": {"own": {"engine": "source"}},
        "mixture": {"name": "m", "resolution": 32, "captions": "own"},
    }
    run_here(*ingest.plan(Recipe.model_validate(document)))
    yield document
    for engine in from_model._ENGINES.values():
        engine.close()
    from_model._ENGINES.clear()


@contextmanager
def answering(respond: Callable[[dict[str, Any]], Reply], **options: Any) -> Iterator[ChatServer]:
    with ChatServer(respond, **options) as server:
        yield server


def a_caption(body: dict[str, Any]) -> Reply:
    """Answer each question with another sentence."""
    words = ["red", "green", "round", "small", "bright", "plain", "flat", "odd"]
    seed = body["seed"]
    text = f"A {words[seed % 8]} shape, number {seed}, on a {words[seed // 8 % 8]} ground."
    return Reply(text, prompt_tokens=40, completion_tokens=12)


def write(
    document: dict[str, Any], server: ChatServer, name: str = "vlm", **settings: Any
) -> Captions:
    """Write a caption set; return its captions by the source ids of the pictures."""
    table = {"engine": "vllm", "model": "tiny", "endpoint": server.url} | settings
    recipe = Recipe.model_validate(document | {"captions": document["captions"] | {name: table}})
    made = recipe.captions[name]
    assert isinstance(made, VllmCaptions)
    model_set.write(recipe, name, made, HERE, mixture_of=recipe)
    return captions_of(recipe, name)


def captions_of(recipe: Recipe, name: str) -> Captions:
    found: Captions = {}
    for index, captions in zip(
        *(tables(recipe.root, f) for f in ("images", f"captions/{name}")), strict=True
    ):
        assert index["key"] == captions["key"]
        found |= dict(
            zip(index["source_id"].to_pylist(), captions["captions"].to_pylist(), strict=True)
        )
    return found


def tables(root: str, family: str) -> list[pa.Table]:
    files = storage.glob_files(f"{root}/{family}/shapes/*.parquet")
    return [storage.read_parquet(f.url) for f in files if "rejected" not in f.name]


def test_a_caption_records_what_was_asked_and_answered(document: dict[str, Any]) -> None:
    with answering(a_caption) as server:
        found = write(document, server, captions_per_image=2, top_p=0.9, top_k=20, max_tokens=99)
    assert len(found) == PICTURES
    bodies = {body["seed"]: body for body in server.bodies}
    captions = [caption for each in found.values() for caption in each]
    assert len({caption["seed"] for caption in captions}) == 2 * PICTURES
    for caption in captions:
        body = bodies[caption["seed"]]
        sampling = {key: body[key] for key in ("temperature", "top_p", "top_k", "max_tokens")}
        assert sampling == {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "max_tokens": 99}
        assert caption["text"] == a_caption(body).text
        assert caption["prompt"] == prompt_of(body)
        assert caption["prompt_kind"] == "describe"
        assert (caption["outcome"], caption["model"]) == ("ok", "tiny")
        assert (caption["prompt_tokens"], caption["completion_tokens"]) == (40, 12)
        assert caption["answer_s"] > 0
        assert caption["asked"].year > 2000
    # Seeds are hashes: asked again, in another corpus, they are the same.
    with answering(a_caption) as server:
        again = write(
            document, server, "again", captions_per_image=2, top_p=0.9, top_k=20, max_tokens=99
        )
    assert [c["seed"] for each in again.values() for c in each] == [c["seed"] for c in captions]


def sizes(server: ChatServer) -> set[tuple[int, int]]:
    found = set()
    for body in server.bodies[1:]:  # the first only asks whether the largest picture fits
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        found.add(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size)
    return found


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (40, 40)),  # the shapes have 48 x 40: never up
        ({"short_edge_px": 32}, (32, 32)),
        ({"short_edge_px": 32, "crop": "none"}, (38, 32)),
        ({"crop": "none"}, (48, 40)),
    ],
)
def test_the_model_sees_the_picture_as_the_settings_say(
    document: dict[str, Any], settings: dict[str, Any], size: tuple[int, int]
) -> None:
    with answering(a_caption) as server:
        write(document, server, **settings)
    assert sizes(server) == {size}


def test_each_dataset_has_its_kind_of_prompt(document: dict[str, Any]) -> None:
    document["datasets"]["shapes"]["prompt"] = "annotation"
    with answering(a_caption) as server:
        annotated = write(document, server)
        plain = write(document, server, "plain", prompts={"shapes": "describe"})
        own = {"kind": "metadata", "text": "Tagged {text}. What is it?"}
        ours = write(document, server, "ours", prompts={"shapes": own})
    (caption,) = annotated["3"]
    assert caption["prompt_kind"] == "annotation"
    assert "yellow ellipse on blue" in caption["prompt"]
    assert {each[0]["prompt"] for each in plain.values()} == {
        "Describe the image in detail using one paragraph."
    }
    assert ours["3"][0]["prompt"] == "Tagged yellow ellipse on blue. What is it?"


def test_what_the_server_refuses_and_what_is_damaged_are_outcomes_of_one_picture(
    document: dict[str, Any],
) -> None:
    refused: list[int] = []

    def respond(body: dict[str, Any]) -> Reply:
        if not refused and body["max_tokens"] > 1:
            refused.append(body["seed"])
        return Reply("too odd", status=400) if body["seed"] in refused else a_caption(body)

    (first, *_) = tables(document["root"], "images")
    (tar, *_) = storage.glob_files(f"{document['root']}/images/shapes/*.tar")
    data = bytearray(storage.read_bytes(tar.url))
    data[first["offset"][7].as_py() + 60] ^= 0xFF
    storage.replace(tar.url, bytes(data))
    with answering(respond) as server:
        found = write(document, server)
    outcomes = Counter(each[0]["outcome"] for each in found.values())
    assert outcomes == {"ok": PICTURES - 2, "picture_failed": 2}
    details = {each[0]["seed"]: each[0]["detail"] for each in found.values() if each[0]["detail"]}
    assert "too odd" in details.pop(refused[0])
    (damaged,) = details.values()
    assert "other bytes than its index says" in damaged


def test_a_run_that_ends_early_asks_again_for_less_than_a_slice(document: dict[str, Any]) -> None:
    # 160 captions a shard; the key is withdrawn in the second.
    many, wanted = 10, 10 * PICTURES
    lock = threading.Lock()
    answered: set[int] = set()

    def until_withdrawn(body: dict[str, Any]) -> Reply:
        with lock:
            if body["max_tokens"] > 1:
                if len(answered) >= 300:
                    return Reply("no such key", status=401)
                answered.add(body["seed"])
        return a_caption(body)

    with answering(until_withdrawn) as server, pytest.raises(EvenmixError, match="no such key"):
        write(document, server, captions_per_image=many, in_flight=8)
    assert len(answered) == 300
    with answering(a_caption) as server:
        found = write(document, server, captions_per_image=many, in_flight=8)
    assert all(len(each) == many for each in found.values())
    asked_again = answered & {body["seed"] for body in server.bodies}
    assert 0 <= len(asked_again) < SLICE_CAPTIONS + 8
    asked = {body["seed"] for body in server.bodies if body["max_tokens"] > 1}
    assert len(asked | answered) == wanted
    left = storage.list_files(f"{document['root']}/captions")
    assert not [file.name for file in left if "slice" in file.name]


def test_a_context_that_is_too_short_is_an_error_before_any_work(document: dict[str, Any]) -> None:
    with (
        answering(a_caption, max_model_len=64) as server,
        pytest.raises(EvenmixError, match=r"(?s)64.*max_model_len"),
    ):
        write(document, server, max_tokens=30)
    assert [body["max_tokens"] for body in server.bodies] == [1]
    assert not storage.glob_files(f"{document['root']}/captions/vlm/**/*.parquet")


def test_a_model_that_the_endpoint_does_not_serve_is_an_error(document: dict[str, Any]) -> None:
    with (
        answering(a_caption, models=["large", "huge"]) as server,
        pytest.raises(EvenmixError, match=r"tiny.*huge|tiny.*large"),
    ):
        write(document, server)


def truncating(body: dict[str, Any]) -> Reply:
    """Answer as `a_caption`, but every fourth caption reaches the limit."""
    whole = a_caption(body)
    return Reply(whole.text, "length") if body["seed"] % 4 == 0 else whole


def test_a_redo_asks_for_those_outcomes_alone_with_new_seeds(document: dict[str, Any]) -> None:
    with answering(truncating) as server:
        parent = write(document, server, captions_per_image=3)
    with answering(a_caption) as server:
        redo = {"parent": "vlm", "redo": ["truncated", "engine_failed"]}
        child = write(document, server, "vlm-2", captions_per_image=3, **redo)
    cut = {
        (k, n)
        for k, each in parent.items()
        for n, c in enumerate(each)
        if c["outcome"] == "truncated"
    }
    assert 5 < len(cut) < 50
    assert len(server.bodies) == 1 + len(cut)
    for key, each in parent.items():
        for number, old in enumerate(each):
            new = child[key][number]
            if (key, number) in cut:
                assert (new["outcome"], new["prompt"]) == ("ok", old["prompt"])
                assert new["seed"] != old["seed"]
            else:
                assert new == old


def test_a_change_of_prompt_asks_for_the_captions_that_it_concerns(
    document: dict[str, Any],
) -> None:
    own = {"kind": "annotation", "text": "Use this: {text}"}
    with answering(a_caption) as server:
        parent = write(document, server, prompts={"shapes": own})
    # What the dataset says of one picture in eight is put in other words.
    for table, file in zip(
        tables(document["root"], "images"),
        storage.glob_files(f"{document['root']}/images/shapes/*.parquet"),
        strict=True,
    ):
        texts = [
            text.replace("orange ellipse", "amber ellipse") for text in table["text"].to_pylist()
        ]
        place = table.schema.get_field_index("text")
        changed = table.set_column(place, "text", pa.array(texts))
        storage.replace(
            file.url, storage.parquet_bytes(changed, storage.parquet_metadata(file.url))
        )
    with answering(a_caption) as server:
        child = write(document, server, "vlm-2", parent="vlm", prompts={"shapes": own})
    assert len(server.bodies) == 1 + 4
    for key, (old,) in parent.items():
        (new,) = child[key]
        if "orange ellipse" in old["prompt"]:
            assert "amber ellipse" in new["prompt"]
        else:
            assert new == old


@dataclass(frozen=True)
class AllKept:
    """Publishes duplicates of which there are none but the first picture of each shard."""

    root: str
    name: str = "dedup"
    version: int = 1
    folder: str = "duplicates/sscd"
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        return {}

    def process(self, item: WorkItem) -> Output:
        keys = read_shard(self.root, "images", item.dataset, item.shard, ["key"])["key"].to_pylist()
        rules = ["exact_copy", *[None] * (len(keys) - 1)]
        table = pa.table({"key": keys, "rule": pa.array(rules, pa.string())})
        return Output(table, Counts(len(keys), len(keys)))


def test_only_what_a_mixture_may_select_is_asked_for(document: dict[str, Any]) -> None:
    images = finished_shards(document["root"], "images", "shapes", "ingest")
    run_here(AllKept(document["root"]), [WorkItem("shapes", shard, {}) for shard in images])
    document["mixture"]["images_per_dataset"] = 10
    with answering(a_caption) as server:
        found = write(document, server, pictures="selected", margin=0.2, captions_per_image=2)
    assert len(server.bodies) == 1 + 2 * 12
    asked = [each for each in found.values() if each[0]["outcome"] == "ok"]
    assert [len(each) for each in asked] == [2] * 12
    others = [each for each in found.values() if each[0]["outcome"] != "ok"]
    assert len(others) == PICTURES - 12
    for (caption,) in others:
        assert {name for name, value in caption.items() if value is not None} == {"outcome"}
        assert caption["outcome"] == "not_asked"
    recipe = Recipe.model_validate(
        document
        | {
            "mixture": document["mixture"] | {"captions": "vlm"},
            "captions": {"vlm": {"engine": "source"}},
        }
    )
    for stage in (Candidates(recipe, with_captions=True), Select(recipe)):
        counts = run_here(stage, stage.plan())["shapes"].counts
    assert counts.records_out == 10
    assert counts.rejected == {"exact_copy": SHARDS, "not_asked": 18, "not_sampled": 2}

    # A larger mixture takes these over and asks for the rest.
    document["mixture"]["images_per_dataset"] = 20
    with answering(a_caption) as server:
        more = write(
            document,
            server,
            "more",
            pictures="selected",
            margin=0.0,
            captions_per_image=2,
            parent="vlm",
            redo=["not_asked"],
        )
    assert len(server.bodies) == 1 + 2 * 8
    assert sum(each[0]["outcome"] == "ok" for each in more.values()) == 20
    for key, each in found.items():
        assert each == more[key] or each[0]["outcome"] == "not_asked"


def test_pictures_that_came_in_since_are_new_to_a_parent_and_unknown_to_dedup(
    document: dict[str, Any],
) -> None:
    images = finished_shards(document["root"], "images", "shapes", "ingest")
    run_here(AllKept(document["root"]), [WorkItem("shapes", shard, {}) for shard in images])
    with answering(a_caption) as server:
        parent = write(document, server)
    for family in ("captions/vlm", "duplicates/sscd"):  # as if the second shard had come later
        summary = Path(document["root"], family, "shapes", "stage.json")
        content = json.loads(summary.read_text())
        del content["items"][max(images)]
        summary.write_text(json.dumps(content))
    with answering(a_caption) as server:
        child = write(document, server, "vlm-2", parent="vlm", redo=["empty"])
        assert len(server.bodies) == 1 + PICTURES // SHARDS
        with pytest.raises(EvenmixError, match=r"lacks 1 shards, .* `evenmix dedup` again"):
            write(document, server, "vlm-3", pictures="selected")
    without_times = [
        {key: [c["text"] for c in each] for key, each in found.items()} for found in (parent, child)
    ]
    assert without_times[0] == without_times[1]


def test_a_child_keeps_no_fewer_captions_than_its_parent(document: dict[str, Any]) -> None:
    with answering(a_caption) as server:
        write(document, server, captions_per_image=3)
        with pytest.raises(EvenmixError, match="has 3 captions a picture"):
            write(document, server, "vlm-2", parent="vlm", captions_per_image=2)
    assert len(server.bodies) == 1 + 3 * PICTURES
    noted = model_set.noted_settings(document["root"], "vlm")
    assert noted is not None
    assert (noted["model"], noted["captions_per_image"]) == ("tiny", 3)


def test_a_run_in_which_all_fails_ends(document: dict[str, Any]) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        return a_caption(body) if body["max_tokens"] == 1 else Reply("no luck", status=500)

    with (
        answering(respond) as server,
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(EvenmixError, match=r"(?s)failed at 16 captions in a row.*no luck"),
    ):
        patch.setattr(from_model, "MAX_FAILURES_IN_A_ROW", 16)
        patch.setattr(conversation, "BACKOFF_S", 0.01)
        write(document, server)
    assert not storage.glob_files(f"{document['root']}/captions/vlm/shapes/*.parquet")


def test_a_shard_whose_pictures_are_all_damaged_or_refused_is_not_the_engines_fault(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_model, "MAX_FAILURES_IN_A_ROW", 4)
    for file in storage.glob_files(f"{document['root']}/images/shapes/*.tar")[:1]:
        storage.replace(file.url, bytes(file.num_bytes))

    def respond(body: dict[str, Any]) -> Reply:
        return a_caption(body) if body["max_tokens"] == 1 else Reply("too odd", status=400)

    with answering(respond) as server:
        found = write(document, server)
    assert Counter(each[0]["outcome"] for each in found.values()) == {"picture_failed": PICTURES}


def test_what_only_decides_the_speed_may_change_between_runs(document: dict[str, Any]) -> None:
    def config(**arguments: Any) -> Mapping[str, Any]:
        settings = VllmCaptions(engine="vllm", arguments=arguments)
        recipe = Recipe.model_validate(document)
        model = ModelIdentity("m", None, "m")
        return VllmCaptioning(recipe.root, "c", settings, model, recipe.datasets, 0).config(
            "shapes"
        )

    slow = config(gpu_memory_utilization=0.9, max_num_seqs=4, dtype="bfloat16")
    assert config(tensor_parallel_size=2, dtype="bfloat16") == slow
    assert config(dtype="float32") != slow


def test_a_panorama_that_is_shown_whole_is_bounded(document: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(document)
    settings = VllmCaptions(engine="vllm", crop="none", short_edge_px=64)
    stage = VllmCaptioning(
        recipe.root, "c", settings, ModelIdentity("m", None, "m"), recipe.datasets, 0
    )
    for height, width, shown in ((40, 4000, (2, 200)), (300, 100, (192, 64)), (50, 50, (50, 50))):
        pixels = np.zeros((height, width, 3), np.uint8)
        assert stage._prepare(pixels).shape[:2] == shown


def test_a_parent_without_a_model_and_one_that_is_not_there_are_errors(
    document: dict[str, Any],
) -> None:
    own = Recipe.model_validate(document)
    items = [
        WorkItem("shapes", shard, {})
        for shard in finished_shards(own.root, "images", "shapes", "ingest")
    ]
    run_here(SourceCaptioning(own.root, "own", SourceCaptions(engine="source")), items)
    with answering(a_caption) as server:
        for parent, problem in (
            ("older", "caption --captions older` first"),
            ("own", "engine source"),
        ):
            with pytest.raises(EvenmixError, match=problem):
                write(document, server, parent=parent)
    assert server.bodies == []


def test_threads_that_wait_for_an_engine_share_its_failure(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def fail(_: Engine) -> None:
        starts.append(1)
        time.sleep(2)  # until the others wait, too
        raise EvenmixError("no server")

    monkeypatch.setattr(Engine, "start", fail)
    config = EngineConfig("tiny", endpoint="http://127.0.0.1:1/v1")
    with ThreadPoolExecutor(3) as pool:
        errors = [
            future.exception()
            for future in [pool.submit(from_model._engine, config, 64, "Say.") for _ in range(3)]
        ]
    assert [str(error) for error in errors] == ["no server"] * 3
    assert len(starts) == 1
    with pytest.raises(EvenmixError, match="no server"):  # asked again later, it is tried again
        from_model._engine(config, 64, "Say.")
    assert len(starts) == 2
