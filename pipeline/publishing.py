"""Publishing a work item: what stands beside the commit first, the commit last.

Attempts at one item may be several, at once or one after a crash. Those at repeatable work publish
equal bytes. Those at observed work, such as downloads, agree on what the first of them published.
"""

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import (
    METADATA_KEY,
    Receipt,
    checksum,
    fingerprint,
    read_receipt,
    table_digest,
)
from pipeline.stage import (
    OBSERVED_SUFFIX,
    REJECTED_SUFFIX,
    Observed,
    Output,
    Plan,
    Stage,
    WorkItem,
    file_names,
    item_identity,
    refuse_other_identity,
    shard_url,
)
from pipeline.summary import dataset_url

_MADE_BY = "evenmix.fingerprint"


def publish_item(stage: Stage, item: WorkItem) -> None:
    """Do an item's work and publish it; an item that has a commit already is left alone.

    Raises:
        EvenmixError: its place is taken by work done in another way, or it cannot be written.
    """
    url = shard_url(stage, item.dataset, item.shard)
    identity = item_identity(stage, item)
    if storage.exists(url):
        refuse_other_identity(stage, item.dataset, item.shard, read_receipt(url), identity)
        return
    output = stage.process(item)
    if not output.counts.is_conserved():
        raise AssertionError(
            f"{stage.name} {item.dataset}/{item.shard} lost records: {output.counts}"
        )
    stem = url.removesuffix(".parquet")
    if output.observed is not None:
        output, rejected = _publish_observed(output, output.observed, stem, fingerprint(identity))
    else:
        rejected = _publish_repeatable(output, stem)
    receipt = Receipt(
        identity=identity,
        counts=output.counts,
        digest=table_digest(output.table),
        tar=None if output.tar is None else checksum([output.tar]),
        rejected=None if rejected is None else checksum([rejected]),
        files={name: checksum([data]) for name, data in output.files.items()},
    )
    metadata = {METADATA_KEY: receipt.to_json()}
    if not storage.publish(url, storage.parquet_bytes(output.table, metadata)):
        refuse_other_identity(stage, item.dataset, item.shard, read_receipt(url), identity)
        return
    for suffix, data in ((".tar", output.tar), (REJECTED_SUFFIX, rejected)):
        # A run with other settings may have taken it for a leftover a moment before the commit.
        if data is not None and not storage.exists(f"{stem}{suffix}"):
            storage.replace(f"{stem}{suffix}", data)


def _rejected_bytes(output: Output) -> bytes | None:
    """Return the file of an item's rejected records, None if there are none."""
    if output.rejected is None or not output.rejected.num_rows:
        return None
    return storage.parquet_bytes(output.rejected, {})


def _publish_repeatable(output: Output, stem: str) -> bytes | None:
    """Publish what stands beside a commit that any attempt makes alike.

    Returns the file of rejected records.
    """
    rejected = _rejected_bytes(output)
    if output.tar is not None:
        _publish_beside_commit(f"{stem}.tar", output.tar, f"{stem}.parquet")
    if rejected is not None:
        _publish_beside_commit(f"{stem}{REJECTED_SUFFIX}", rejected, f"{stem}.parquet")
    for name, data in output.files.items():
        url = storage.join(stem.rpartition("/")[0], name)
        _publish_beside_commit(url, data, f"{stem}.parquet")
    return rejected


def _publish_observed(
    output: Output, observed: Observed, stem: str, item_fingerprint: str
) -> tuple[Output, bytes | None]:
    """Publish what stands beside a commit that another attempt would make otherwise.

    Of several attempts at an item, killed or still alive, the first to publish its tar decides
    which pictures are kept, and the first to publish rejected records decides why the others are
    not. No attempt replaces another's file, so whichever commits, commits to files that stay. The
    observations come first and carry the item's fingerprint, by which attempts know each other.

    Returns the output as it is published, and the file of rejected records.
    """
    tar, tar_url, rejected_url = output.tar, f"{stem}.tar", f"{stem}{REJECTED_SUFFIX}"
    assert tar is not None
    observed_url, made_by = f"{stem}{OBSERVED_SUFFIX}", {_MADE_BY: item_fingerprint}
    observations = storage.parquet_bytes(observed.table, made_by)
    is_first = storage.publish(observed_url, observations)
    if not is_first and storage.parquet_metadata(observed_url).get(_MADE_BY) != item_fingerprint:
        raise EvenmixError(
            f"{observed_url} was left by a run with other settings or sources, which may still be "
            "busy; if it is not, start the same command again, which removes it"
        )
    if not storage.publish(tar_url, tar):
        tar = storage.read_bytes(tar_url)
        output = observed.adopt(tar, None)
    rejected = _rejected_bytes(output)
    if rejected is not None and not storage.publish(rejected_url, rejected):
        rejected = storage.read_bytes(rejected_url)
        output = observed.adopt(tar, storage.read_parquet(rejected_url))
    return output, rejected


def _publish_beside_commit(url: str, data: bytes, commit_url: str) -> None:
    """Publish a file that belongs to a commit which is still to come.

    If the name is taken, an equal attempt may be under way: then the bytes are equal and stay.
    Other bytes without a commit were left by a killed run with other settings and are replaced,
    in one step: the equal attempt may commit meanwhile, and no commit may be without its tar.
    """
    if storage.publish(url, data):
        return
    if checksum(storage.read_chunks(url)) != checksum([data]) and not storage.exists(commit_url):
        storage.replace(url, data)


def remove_leftovers(stage: Stage, plan: Plan) -> None:
    """Remove what killed runs with other settings or sources observed and never committed.

    Workers do not: one that was thought dead could remove what another has committed meanwhile.
    """
    for dataset in {item.dataset for item in plan.missing}:
        folder = dataset_url(stage.root, stage.folder, dataset)
        planned = [item.shard for item in plan.items if item.dataset == dataset]
        there = set(file_names(folder, planned))
        for item in plan.missing:
            name = f"{item.shard}{OBSERVED_SUFFIX}"
            if item.dataset != dataset or name not in there:
                continue
            made_by = storage.parquet_metadata(storage.join(folder, name)).get(_MADE_BY)
            is_other = made_by != fingerprint(item_identity(stage, item))
            commit_url = shard_url(stage, dataset, item.shard)
            if is_other and not storage.exists(commit_url):
                for suffix in (".tar", REJECTED_SUFFIX, OBSERVED_SUFFIX):
                    storage.remove(storage.join(folder, f"{item.shard}{suffix}"))
                if storage.exists(commit_url):
                    raise EvenmixError(
                        f"a run with other settings has published {commit_url} while its tar was "
                        "removed as a leftover; stop that run, and remove all files of this shard, "
                        f"{folder}/{item.shard}.*"
                    )
