# dvar on CPUs, with the bundled models:
#   docker build --tag dvar --build-arg TORCH="torch==2.13.0 --index-url ..." .
#   mkdir -p runs && docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/runs:/work/runs" dvar demo
# The build argument names PyTorch's own index of builds for CPUs; without it, torch for Linux brings CUDA with it.
FROM python:3.11-slim
ARG TORCH="torch==2.13.0"
ENV HF_HOME=/work/.cache PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The build argument pins it.
# hadolint ignore=DL3013
RUN pip install $TORCH
COPY . /source
RUN pip install --constraint /source/constraints.txt "/source[train,tensorboard]" /source/packaging/dvar-mini \
    && rm -r /source \
    && useradd --uid 1000 --create-home --home-dir /work dvar
USER 1000
WORKDIR /work
ENTRYPOINT ["dvar"]
CMD ["--help"]
