# syntax=docker/dockerfile:1
# nemo_kto on an NVIDIA container, whose PyTorch, Megatron-Core and Transformer Engine stay as they are.
#
#   docker build -t nemo_kto .
#   docker build -t nemo_kto --build-arg BASE=nvcr.io/nvidia/nemo:<tag> .
#   docker build -t nemo_kto --build-arg BASE=nvcr.io/nvidia/pytorch:26.06-py3 --build-arg PYTHON=/usr/bin/python3 .
#
# nemo:26.06 holds Python 3.12 in /opt/venv, PyTorch 2.12 and Megatron-Core 0.18; the pytorch images hold no Megatron-Core, and
# get the tested one. The versions the tests run with are those of constraints.txt; docs/versions.md says what else was tried,
# and how caches, tokens and a clone are mounted.
ARG BASE=nvcr.io/nvidia/nemo:26.06
FROM ${BASE}

ARG BASE
LABEL org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.title="nemo_kto" \
      org.opencontainers.image.description="KTO of language models on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0"

# Some bases run as somebody who may not write to their Python. Their user comes back at the end if it is named here
# (`docker image inspect --format '{{.Config.User}}' <base>` tells it): --build-arg RUN_AS=1000
ARG RUN_AS=root
USER root
ARG PYTHON=/opt/venv/bin/python
WORKDIR /opt/nemo_kto
COPY . .

# Of the tested versions, install only the packages that the container lacks, each without its dependencies: nothing that
# is there is replaced. PIP_CONSTRAINT, in which pytorch images pin what they were made with, would be in the way of the others.
RUN ${PYTHON} - > /tmp/missing.txt <<'EOF'
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement
from packaging.version import Version


def there(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# beside a numpy 1 the last versions of what wants numpy 2 by now
beside_numpy_1 = {"ml-dtypes": "==0.5.4", "pandas": "==2.3.3", "pyarrow": "==24.0.0", "pytz": "==2026.2"}
old = beside_numpy_1 if Version(there("numpy") or "2").major < 2 else {}
tools = {"torch", "hypothesis", "mypy", "pytest", "pytest-xdist", "execnet", "ruff"}
pins, _, _ = open("constraints.txt", encoding="utf-8").read().partition("\n# only `make docs`")
lines = [line for line in pins.splitlines() if not line.startswith("#")]
needs = {need.name: need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate()}
for need in (needs | {name: Requirement(name + pin) for name, pin in old.items()}).values():
    if need.name not in tools and there(need.name) is None:
        print(f"{need.name}{need.specifier}")
EOF
RUN if command -v uv > /dev/null; then install="uv pip install --python ${PYTHON} --no-cache"; \
    else install="${PYTHON} -m pip install --no-cache-dir"; fi; \
    unset PIP_CONSTRAINT; \
    export UV_BREAK_SYSTEM_PACKAGES=1 PIP_BREAK_SYSTEM_PACKAGES=1; \
    $install --no-deps -r /tmp/missing.txt && $install --no-deps .

# A container's package of a wrong version was left alone: say so now rather than in the middle of a job.
WORKDIR /workspace
RUN ${PYTHON} - <<'EOF'
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

wrong = []
for need in map(Requirement, requires("nemo-kto")):
    if need.marker is not None and not need.marker.evaluate({"extra": ""}):
        continue
    try:
        found = version(need.name)
    except PackageNotFoundError:
        wrong.append(f"{need.name} is missing")
        continue
    print(need.name, found)
    if not need.specifier.contains(found, prereleases=True):
        wrong.append(f"{need}, found {found}")
if wrong:
    raise SystemExit("this base image does not fit: " + "; ".join(wrong))
EOF

ENV PATH=/opt/venv/bin:${PATH}
USER ${RUN_AS}
