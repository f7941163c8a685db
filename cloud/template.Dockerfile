# The Flex Template: the workers' image with Dataflow's launcher and what it runs in it.
#   docker build -f cloud/template.Dockerfile -t evenmix-template --build-arg CPU_IMAGE=evenmix-cpu .

ARG CPU_IMAGE
FROM ${CPU_IMAGE}
COPY --from=gcr.io/dataflow-templates-base/python311-template-launcher-base:latest \
    /opt/google/dataflow/python_template_launcher /opt/google/dataflow/python_template_launcher
COPY cloud/launch.py /template/launch.py
ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/template/launch.py
ENTRYPOINT ["/opt/google/dataflow/python_template_launcher"]
