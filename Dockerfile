# The server with the bundled model: docker build -t steadystate .
#
# On the CPU:  docker build -t steadystate:cpu --build-arg BASE=debian:bookworm-20260824-slim .
# BASE is any Debian or Ubuntu with Python 3.11 or newer. TORCH names the lock that torch is
# installed from: cuda is the build on PyPI, which runs on the CPU too, in several GB; cpu is the
# small one, for which pip has to be told where it is. A pip.conf that says so, or names a mirror,
# is handed over as a secret and stays out of the image: --secret id=pip,src=pip.conf

# cudart and nothing more: torch's wheels bring the libraries, Triton's its assembler
ARG BASE=nvidia/cuda:13.0.3-base-ubuntu24.04


FROM ${BASE} AS build

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 python3-venv \
    && python3 -m venv /opt/steadystate

ARG TORCH=cuda
COPY deploy/lock/common.txt deploy/lock/${TORCH}.txt /opt/steadystate/share/lock/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/steadystate/bin/pip install --disable-pip-version-check --root-user-action=ignore \
        --require-hashes --no-deps --only-binary :all: \
        --requirement /opt/steadystate/share/lock/common.txt \
        --requirement "/opt/steadystate/share/lock/${TORCH}.txt"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY model model
COPY server server
# pip itself has no business in a server
RUN /opt/steadystate/bin/pip install --disable-pip-version-check --root-user-action=ignore \
        --no-index --no-deps --no-build-isolation . \
    && /opt/steadystate/bin/pip check --disable-pip-version-check \
    && /opt/steadystate/bin/pip uninstall --yes --quiet --root-user-action=ignore pip


FROM ${BASE} AS server

# gcc and the headers are for Triton, which compiles a launcher in C for every kernel
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        gcc libc6-dev libpython3-dev python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && groupadd --gid 10001 steadystate \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/steadystate \
        --shell /usr/sbin/nologin steadystate \
    && install -d -o steadystate -g steadystate -m 0750 \
        /var/cache/steadystate /var/lib/steadystate /var/lib/steadystate/contexts \
    && install -d /models

COPY --from=build /opt/steadystate /opt/steadystate

# Compiled kernels, and models from the hub, go where a volume keeps them; HOME too.
ENV PATH=/opt/steadystate/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/var/cache/steadystate \
    XDG_CACHE_HOME=/var/cache/steadystate \
    TRITON_CACHE_DIR=/var/cache/steadystate/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/steadystate/inductor \
    CUDA_CACHE_PATH=/var/cache/steadystate/cuda \
    HF_HOME=/var/cache/steadystate/huggingface \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    STEADYSTATE_HOST=0.0.0.0 \
    STEADYSTATE_PORT=8000

ARG BASE
ARG TORCH=cuda
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Steadystate" \
      org.opencontainers.image.description="A long-context inference server for Lightning Attention models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}" \
      org.steadystate.torch="${TORCH}"

USER 10001:10001
WORKDIR /var/lib/steadystate
VOLUME ["/var/cache/steadystate", "/var/lib/steadystate"]
EXPOSE 8000

# SIGTERM drains: running requests may take STEADYSTATE_DRAIN_SECONDS (60), so stop with
# `docker stop --timeout 75` or more. Loading a large model may take all of the start period.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python3", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['STEADYSTATE_PORT']), timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]

# tini: as process 1 a Python that is still importing would not hear SIGTERM
ENTRYPOINT ["tini", "--", "steadystate", "serve"]
