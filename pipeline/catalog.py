"""The twelve public datasets of i1, as data: where the bytes are and how to read a record.

What nobody could be found to state, or what two sources disagree on, is listed under
``unverified`` and no rule depends on it. `evenmix datasets NAME --check` compares an entry with
the live source. Datasets beyond these need no entry: a recipe describes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.dataset import Dataset


@dataclass(frozen=True)
class InI1:
    """A dataset in i1's mixture and in its published captions (zlab-princeton/i1-captions).

    ``pictures`` is the count that i1's weights use, ``captioned`` the rows of the caption subset,
    ``captions_each`` the captions of a picture there (None: unverified).
    """

    pictures: int
    captioned: int
    captions_each: int | None


@dataclass(frozen=True)
class Subset:
    """A folder of a dataset, with what is known of its size."""

    name: str
    num_records: int | None = None
    num_files: int | None = None
    num_bytes: int | None = None


@dataclass(frozen=True)
class Entry:
    """One dataset of the catalogue.

    ``home`` is its page for people; ``splits`` are those that exist, of which the first is read
    (i1 uses no other). ``gated`` tells whether an account must accept terms (None: unverified).
    ``num_records``, ``num_files`` and ``num_bytes`` are of what is read, None where unverified;
    ``num_bytes`` is exact where ``checksums`` (file name to ``md5:…``) has the file, else rounded.
    ``columns`` are the columns of a row or the keys of a record's JSON, as shell patterns; empty
    where unverified. ``size_px`` is the declared width and height (None: varies).

    ``stages`` are the resolutions (px) at which i1 trains on it; ``join`` tells whether the
    dataset's ``join_rule`` is how ``caption_subset`` of the published captions knows a picture.
    """

    title: str
    home: str
    dataset: Dataset
    splits: tuple[str, ...]
    gated: bool | None
    terms: str
    in_i1: InI1
    stages: tuple[int, ...]
    join: Literal["exact", "ambiguous", "unknown"]
    join_note: str
    unverified: tuple[str, ...]
    num_records: int | None = None
    num_files: int | None = None
    num_bytes: int | None = None
    columns: tuple[str, ...] = ()
    size_px: tuple[int | None, int | None] = (None, None)
    checksums: Mapping[str, str] = field(default_factory=dict)
    subsets: tuple[Subset, ...] = ()
    notes: tuple[str, ...] = ()


_FLUXREASON = Entry(
    title="FLUX-Reason-6M",
    home="https://huggingface.co/datasets/LucasFang/FLUX-Reason-6M",
    dataset=Dataset(
        layout="parquet",
        source="hf://datasets/LucasFang/FLUX-Reason-6M/**/fluxdb-*.parquet",
        revision="a92fe58364cbd2273dc10938184f995388052185",
        licence="Apache-2.0",
        id_rule="{id}",
        join_rule="{id}",
        text_field="caption_detail",
        caption_subset="fluxreason",
    ),
    splits=("train",),
    gated=None,
    terms="Apache-2.0. The pictures were made by FLUX.1-dev, whose own terms may bind their use.",
    num_records=5_890_279,
    num_files=1_180,
    num_bytes=823_000_000_000,
    columns=("id", "image", "caption_*", "bool_caption_*", "score_*"),
    size_px=(1024, 1024),
    in_i1=InI1(5_890_279, 5_890_279, 5),
    stages=(256, 512, 1024),
    join="exact",
    join_note="i1's key is the column id, such as aesthetics-part01-00000000",
    subsets=(
        Subset("Aesthetics-Part01", num_files=415, num_bytes=228_000_000_000),
        Subset("Aesthetics-Part02", num_files=454, num_bytes=264_000_000_000),
        Subset("Imaginative", num_files=168, num_bytes=269_000_000_000),
        Subset("Text", num_files=143, num_bytes=62_000_000_000),
    ),
    unverified=("Whether the repository is gated.",),
    notes=(
        "Of the eight captions only caption_detail is always present; image.path is always null.",
        "bool_caption_original is a mark of quality: it does not say whether the caption is there.",
    ),
)

_GPTEDIT = Entry(
    title="GPT-Edit",
    home="https://huggingface.co/datasets/UCSC-VLAA/gpt-edit-simpler",
    dataset=Dataset(
        layout="parquet",
        source="hf://datasets/UCSC-VLAA/gpt-edit-simpler/data/**/*.parquet",
        revision="021f1eb3c945a9e9600fa325388b5657e5d31da4",
        licence="not stated",
        id_rule="{id}",
        join_rule="{id}",
        image_field="output",
        caption_subset="gptedit",
    ),
    splits=("train",),
    gated=None,
    terms=(
        "The repository states no licence; its parent dataset is CC BY 4.0, but one ingredient "
        "(UCSC-VLAA/HQ-Edit) is tagged CC BY-NC 4.0."
    ),
    num_records=1_553_575,
    num_bytes=4_940_000_000_000,
    columns=("id", "output"),
    in_i1=InI1(1_553_575, 1_553_575, 5),
    stages=(256, 512, 1024),
    join="exact",
    join_note="i1's key is the column id; its picture is the edited one, output",
    unverified=(
        "Whether rows have input and instruction, as the parent's do; if so, a recipe may add "
        'extra_fields = ["instruction"].',
        "The number of files; 177 upload parts are known.",
        "The size of the pictures.",
        "Whether the repository is gated.",
    ),
    notes=("The parent's card counts HQ-Edit 183,182, UltraEdit 100,008, OmniEdit 1,270,385.",),
)

_IMAGENET22K = Entry(
    title="ImageNet-22K",
    home="https://huggingface.co/datasets/timm/imagenet-22k-wds",
    dataset=Dataset(
        layout="webdataset",
        source="hf://datasets/timm/imagenet-22k-wds/imagenet22k-train-*.tar",
        licence="ImageNet terms",
        id_rule="{key}",
        join_rule="{key}",
        caption_subset="imagenet22k",
    ),
    splits=("train", "validation"),
    gated=None,
    terms=(
        "The card's licence tag is `imagenet`; the terms of its 12k sibling are non-commercial "
        "research and education. Pictures belong to their authors."
    ),
    num_records=13_673_551,
    num_files=4_096,
    num_bytes=1_300_000_000_000,
    in_i1=InI1(13_673_551, 13_673_544, 9),
    stages=(256, 512),
    join="exact",
    join_note="i1's key is the sample's __key__",
    unverified=(
        "The revision: none is pinned by others.",
        "The number of training tars: the names run from 0000 to 4095, the card says 4095 shards, "
        "another card counts 4,608 tars with validation.",
        "Whether the 1,300 GB include validation.",
        "The name of the field with the class label; there is no other text.",
        "A cap on the pictures' size (of the 12k sibling the shorter edge is at most 600 px).",
        "Whether the repository is gated.",
    ),
    notes=(
        "Validation has another 472,840 pictures.",
        "The Fall 2011 release includes person synsets that ImageNet has removed since.",
        "EXIF data has been stripped.",
        "The caption subset has a further column no_center_crop.",
    ),
)

_INATURALIST = Entry(
    title="iNaturalist 2024",
    home="https://github.com/inquire-benchmark/INQUIRE/tree/main/data",
    dataset=Dataset(
        layout="tar",
        source="https://ml-inat-competition-datasets.s3.amazonaws.com/2024/train.tar.gz",
        mirror=True,
        licence="not known",
        id_rule="{stem}",
        join_rule="{stem}",
        path_pattern=r"(?:^|/)\d+_(?P<taxon>[^/]+)/[^/]+$",
        text_field="taxon",
        caption_subset="inaturalist",
    ),
    splits=("train",),
    gated=False,
    terms=(
        "The licence of iNat24 is unverified; INQUIRE-Rerank, which is derived from it, is "
        "CC BY-NC 4.0."
    ),
    num_records=4_813_543,
    num_files=1,
    num_bytes=472_688_822_915,
    checksums={"train.tar.gz": "md5:2b1c7d7a023114c34cfccfb663c889a8"},
    in_i1=InI1(4_813_543, 4_813_543, 1),
    stages=(),
    join="exact",
    join_note="i1's key is the file's stem, a uuid",
    unverified=(
        'The number of pictures: "5,000,000" is stated, i1 counts 4,813,543.',
        "The size of the pictures.",
    ),
    notes=(
        "i1's final mixture leaves it out: removing it helped.",
        "The text is the taxon of the folder, such as Animalia_…_Aves; there are 10,000.",
        "train.json.tar.gz beside it lists images[].id and file_name.",
    ),
)

_MEGALITH10M = Entry(
    title="Megalith-10M",
    home="https://huggingface.co/datasets/madebyollin/megalith-10m",
    dataset=Dataset(
        layout="url_list",
        source="hf://datasets/madebyollin/megalith-10m/data/megalith-*.parquet",
        revision="1e65a79953396f6d05f60eba4cc564541ad4be8c",
        licence="CC0, PDM, US-Gov or none known",
        id_rule="{url}",
        image_url="{url}",
        extra_fields=["url_highres", "url_source"],
        caption_subset="megalith10m",
    ),
    splits=("megalith",),
    gated=None,
    terms=(
        "The list is MIT; its pictures are on Flickr as CC0, public domain mark, US government "
        "work or no known copyright restrictions."
    ),
    num_records=9_580_000,
    num_files=10,
    columns=("url", "url_highres", "url_source"),
    in_i1=InI1(9_393_971, 9_393_971, 1),
    stages=(256, 512),
    join="unknown",
    join_note=(
        "i1's keys are the nine-digit keys of drawthingsai/megalith-10m; which URL has which is "
        "in that copy's rows (key, status, url), not in the list"
    ),
    unverified=(
        "Whether the repository is gated.",
        "How many links are dead; 3 of 50 tried were. Flickr limits the rate.",
    ),
    notes=(
        "The longer side is 1024 px, the median shorter one 683 px.",
        "drawthingsai/megalith-10m (829c00885e3926118674375b50c41d970aceb5ac) has copies of the "
        "pictures in NNNNN.tar, tagged `cc`.",
    ),
)

_MIDJOURNEYV6 = Entry(
    title="Midjourney v6",
    home="https://huggingface.co/datasets/Photoroom/midjourney-v6-recap",
    dataset=Dataset(
        layout="parquet",
        source="hf://datasets/Photoroom/midjourney-v6-recap/train_*.parquet",
        revision="21c628db81401da88c5b33507230528cf3fe4a12",
        licence="MIT (unverified)",
        id_rule="{id}:{file}:{row}",
        text_field="prompt",
        extra_fields=["id", "llava", "gemini", "qwen3"],
        caption_subset="midjourneyv6",
    ),
    splits=("train",),
    gated=None,
    terms="MIT, as a third party says.",
    num_records=1_240_000,
    columns=("id", "prompt", "llava", "gemini", "qwen3", "*_status", "image"),
    size_px=(1024, 1024),
    in_i1=InI1(1_240_185, 1_240_185, 5),
    stages=(256, 512, 1024),
    join="unknown",
    join_note=(
        "i1's keys are {id}_0 to {id}_3; four rows have one id, their order is not that of the "
        "suffixes, and some suffixes have no captions"
    ),
    unverified=(
        "The number of rows and files, and the bytes.",
        "The licence, and all else that the card says.",
        "Whether the repository is gated.",
    ),
    notes=("A row is one picture; there is no grid of four.",),
)

_PEXELS = Entry(
    title="Pexels",
    home="https://huggingface.co/datasets/animetimm/pexels-tagger-v0-w640-ws-full",
    dataset=Dataset(
        layout="webdataset",
        source="hf://datasets/animetimm/pexels-tagger-v0-w640-ws-full/train/*.tar",
        licence="Pexels licence",
        id_rule="{key}",
        join_rule="{key}",
        caption_subset="pexels",
    ),
    splits=("train", "val", "test"),
    gated=True,
    terms=(
        "Accept the terms at the repository's page (granted automatically). The Pexels terms "
        "restrict use for machine learning, as a third party reads them."
    ),
    num_records=2_800_000,
    columns=("id", "width", "height"),
    size_px=(640, None),
    in_i1=InI1(2_810_634, 2_810_634, None),
    stages=(256, 512),
    join="exact",
    join_note="i1's key is the sample's __key__, the Pexels id",
    unverified=(
        "The revision: none is pinned by others.",
        "How many of the 127 tars are training ones, and the bytes.",
        "Whether i1's count includes val and test.",
        "Tags or alternative texts in the JSON.",
        "The number of captions of a picture.",
    ),
    notes=("meta.json in the repository lists exist_ids.",),
)

_PLACES = Entry(
    title="Places365-challenge",
    home="http://places2.csail.mit.edu/download.html",
    dataset=Dataset(
        layout="tar",
        source=("https://data.csail.mit.edu/places/places365/train_large_places365challenge.tar"),
        mirror=True,
        licence="not known",
        id_rule="{category}/{stem}",
        join_rule="{parent}_{stem}",
        # These leaf folders stand for several categories; natural_history_museum is none of them.
        ambiguous_joins=[
            "exterior_[0-9]*",
            "indoor_[0-9]*",
            "natural_[0-9]*",
            "outdoor_[0-9]*",
            "platform_[0-9]*",
        ],
        # The folders below the one of the first letter: a/abbey/…, s/swimming_pool/indoor/….
        path_pattern=r"(?:^|/)[a-z]/(?P<category>[^/]{2,}(?:/[^/]+)*)/[^/]+$",
        text_field="category",
        caption_subset="places365-challenge2016",
    ),
    splits=("train",),
    gated=False,
    terms="The licence is unverified; pictures belong to their authors.",
    num_records=8_026_628,
    num_files=1,
    num_bytes=511_257_384_960,
    checksums={"train_large_places365challenge.tar": "md5:605f18e68e510c82b958664ea134545f"},
    in_i1=InI1(8_026_628, 7_221_597, 1),
    stages=(256, 512),
    join="ambiguous",
    join_note=(
        "i1's key has only the last folder: 56 categories share the five names outdoor (25), "
        "indoor (25), exterior, platform and natural (2 each), so that a caption may be another "
        "picture's; those joins are marked ambiguous"
    ),
    unverified=(
        "Whether the tar nests a.tar to z.tar, as its kit says, or holds the pictures directly, "
        "as another reader has it; both are read.",
        "The number of pictures: the same kit says 8,026,628 and 8,097,967.",
        "The licence.",
    ),
    notes=("The shorter side is 512 px, but smaller originals are kept.",),
)

_REDCAPS = Entry(
    title="RedCaps",
    home="https://redcaps.xyz",
    dataset=Dataset(
        layout="url_list",
        source="hf://datasets/kdexd/red_caps/data/redcaps_v1.0_annotations.zip",
        revision="0400b045a9750532447784f85dacee06a275ad8f",
        licence="non-commercial research",
        id_rule="{image_id}",
        join_rule="{image_id}",
        image_url="{url}",
        text_field="caption",
        extra_fields=["raw_caption", "subreddit", "permalink"],
        records_field="annotations",
        placeholder_urls=["*i.imgur.com/removed.png"],
        caption_subset="redcaps",
    ),
    splits=("train",),
    gated=None,
    terms="Metadata CC BY 4.0; the pictures are for non-commercial research only.",
    num_records=12_000_000,
    num_files=1,
    columns=(
        "image_id", "url", "raw_caption", "caption", "subreddit", "score", "created_utc",
        "permalink", "author", "crosspost_parents",
    ),
    in_i1=InI1(4_817_431, 4_817_431, 5),
    stages=(256, 512, 1024),
    join="exact",
    join_note="i1's key is image_id; it has captions for the 4.8M pictures that it could still get",
    unverified=(
        "The bytes of the annotations; the repository has 1.06 GB.",
        "Whether the repository is gated.",
        "The rates of animated and CMYK pictures.",
    ),
    notes=(
        "350 subreddits, in files annotations/<subreddit>_<year>.json.",
        "Imgur answers for a picture that was removed with the picture removed.png.",
        "RedCaps' own downloader waits 2 s for each Imgur picture and saves it again as JPEG.",
    ),
)  # fmt: skip

_RENDERED_TEXT = Entry(
    title="RenderedText",
    home="https://huggingface.co/datasets/wendlerc/RenderedText",
    dataset=Dataset(
        layout="webdataset",
        source="hf://datasets/wendlerc/RenderedText/**/*.tar",
        revision="9a10151dc56b32f244403aa88127d146eb10e353",
        licence="not stated",
        id_rule="{key}",
        join_rule="{key}",
        extra_fields=["ocr_annotation"],
        duplicates="exact",
        caption_subset="rendered_text",
        prompt="rendered_text",
        lines_field="ocr_annotation.text",
    ),
    splits=("train",),
    gated=None,
    terms="The repository states no licence; a question about it is unanswered.",
    num_records=12_000_000,
    columns=("ocr_annotation",),
    size_px=(1024, 1024),
    in_i1=InI1(11_977_824, 11_977_816, 5),
    stages=(256, 512),
    join="exact",
    join_note="i1's key is the sample's __key__",
    unverified=(
        "The number of files and the bytes.",
        "Other keys of the JSON than ocr_annotation.",
        "Whether a key at the root is used again below remaining.",
        "The licence.",
        "Whether the repository is gated.",
    ),
    notes=(
        "NNNNNN.tar at the root are the first 10M pictures, remaining/NNNNNN.tar another 2M.",
        "ocr_annotation.text is the list of the lines in the picture, which i1's prompt quotes.",
        "Its pictures have 1024 px, yet i1 leaves it out at that resolution.",
    ),
)

_TEXTATLAS = Entry(
    title="TextAtlas5M",
    home="https://huggingface.co/datasets/CSU-JPG/TextAtlas5M",
    dataset=Dataset(
        layout="parquet",
        source="hf://datasets/CSU-JPG/TextAtlas5M/*/train-*.parquet",
        revision="f9f2a0f5000fbb078f718197acb45cfb9ceed551",
        licence="MIT, subsets vary",
        id_rule="{folder}:{image_path}",
        join_rule="{folder}:{image_path}",
        text_field="annotation",
        duplicates="exact",
        caption_subset="textatlas",
        prompt="annotation",
    ),
    splits=("train",),
    gated=None,
    terms=(
        'Tagged MIT; a third party calls the subsets "mixed", some non-commercial or share-alike.'
    ),
    num_records=5_398_826,
    num_bytes=1_200_000_000_000,
    columns=("image", "image_path", "annotation"),
    in_i1=InI1(5_397_762, 5_396_890, 5),
    stages=(256, 512, 1024),
    join="exact",
    join_note="i1's key is subset:image_path",
    subsets=(
        Subset("CleanTextSynth", 1_907_721, 67),
        Subset("CoverBook", 207_566, 5),
        Subset("LongWordsSubset-A", 259_897),
        Subset("LongWordsSubset-M", 1_250_428),
        Subset("PPT2Details", 298_565, 14),
        Subset("PPT2Structured", 96_401, 36),
        Subset("Paper2Text", 356_658, 116),
        Subset("StyledTextSynth", 425_826),
        Subset("TextScenesHQ", 48_935),
        Subset("TextVisionBlend", 546_829, 22, 42_600_000_000),
    ),
    unverified=(
        "Whether rows also have id or image_id, which i1's two scripts would then use instead of "
        "image_path.",
        "The rows of a subset: the project's README counts 36,576 in TextScenesHQ and 1,299,992 "
        "in LongWordsSubset-M.",
        "The licence of each subset.",
        "The number of files of four subsets.",
        "The size of the pictures (an example of CleanTextSynth has 512 x 512 px).",
        "Whether the repository is gated.",
    ),
    notes=("TextScenesHQ also has a column raw_text.",),
)

_YFCC = Entry(
    title="YFCC100M",
    home="https://multimediacommons.wordpress.com/yfcc100m-core-dataset/",
    dataset=Dataset(
        layout="sqlite",
        source=(
            "https://multimedia-commons.s3-us-west-2.amazonaws.com/tools/etc/yfcc100m_dataset.sql"
        ),
        mirror=True,
        licence="Creative Commons",
        id_rule="{photoid}",
        join_rule="{photoid}",
        image_url=(
            "https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images/"
            "{downloadurl:multimedia_commons_path}.jpg"
        ),
        text_field="description",
        licence_field="licensename",
        extra_fields=["title", "usertags", "marker", "downloadurl"],
        table="yfcc100m_dataset",
        min_bytes=2_600,
        placeholder_bytes=[9_218],
        caption_subset="yfcc",
    ),
    splits=("train",),
    gated=False,
    terms=(
        "Six Creative Commons licences, one by picture (licensename); about 31.8 % allow "
        "commercial use."
    ),
    num_records=99_171_688,
    num_files=1,
    num_bytes=65_644_027_904,
    checksums={"yfcc100m_dataset.sql": "md5:b8e3fa7f40ee2f309d63b8de8d755495"},
    columns=(
        "photoid", "downloadurl", "title", "description", "usertags", "licensename", "marker", "*",
    ),
    in_i1=InI1(98_121_424, 97_945_286, 2),
    stages=(256,),
    join="exact",
    join_note="i1's key is photoid",
    unverified=("The size of the pictures (about 500 px on the longer side).",),
    notes=(
        "The database is 65.6 GB; its 99,171,688 pictures are another 11 TiB, fetched one by one.",
        "i1 does not filter the videos, so marker is kept and not tested.",
        "For a missing picture the bucket may answer with XML, or Flickr's placeholder of 9,218 "
        "bytes; less than 2,600 bytes are no picture.",
    ),
)  # fmt: skip

CATALOG: Mapping[str, Entry] = {
    "fluxreason": _FLUXREASON,
    "gptedit": _GPTEDIT,
    "imagenet22k": _IMAGENET22K,
    "inaturalist": _INATURALIST,
    "megalith10m": _MEGALITH10M,
    "midjourneyv6": _MIDJOURNEYV6,
    "pexels": _PEXELS,
    "places365-challenge2016": _PLACES,
    "redcaps": _REDCAPS,
    "rendered_text": _RENDERED_TEXT,
    "textatlas": _TEXTATLAS,
    "yfcc": _YFCC,
}
"""The datasets by the names of their caption subsets."""
