# An image to train in: CUDA 13.0, Python 3.12 and the tested set of packages. launch/README.md says
# how Slurm jobs use it.
#
#   docker build -t dynmoe .
#   docker run --rm --gpus all --ipc=host dynmoe          # the doctor looks around
#
# NOT BUILT YET: there was no container engine where it was written. hadolint has no objection.
#
# Two libraries are left out unless asked for; they are compiled, which takes long, and were not
# tried:
#   --build-arg TRANSFORMER_ENGINE=<version>
#   --build-arg APEX_COMMIT=<commit of NVIDIA's repository>

FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Not pinned: Ubuntu keeps one version of a package, the one with its security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/megatron-dynmoe
# No code but the version's, so that a change of code leaves the large layer below as it is.
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY megatron_dynmoe/__init__.py megatron_dynmoe/
RUN pip install --constraint constraints.txt --editable .
ARG TRANSFORMER_ENGINE=""
RUN if [ -n "$TRANSFORMER_ENGINE" ]; then \
        pip install --constraint constraints.txt --no-build-isolation \
            "transformer-engine[core_cu13,pytorch]==$TRANSFORMER_ENGINE"; \
    fi
ARG APEX_COMMIT=""
RUN if [ -n "$APEX_COMMIT" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation \
            "git+https://github.com/NVIDIA/apex@$APEX_COMMIT"; \
    fi

# torch brings CUDA's libraries, so this one needs no toolkit; Triton compiles with gcc. A job notes
# its checkout's commit with git, whoever owns the checkout, and finds its network with ip.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git iproute2 libc6-dev python3.12-dev \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system safe.directory '*' \
    && useradd --create-home --uid 10001 dynmoe
COPY --from=build /opt/venv /opt/venv
COPY . /opt/megatron-dynmoe
# Not the code's folder: from there Python would take this copy before a checkout that is mounted.
WORKDIR /home/dynmoe
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
# A check in the background would take GPU memory from a training; ask the doctor instead.
HEALTHCHECK NONE
CMD ["python", "-m", "megatron_dynmoe.doctor"]
