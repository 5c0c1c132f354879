# syntax=docker/dockerfile:1
# nemo_kto on an NVIDIA container, whose PyTorch, Megatron-Core and Transformer Engine stay as they are.
#
#   docker build -t nemo_kto .
#   docker build -t nemo_kto --build-arg BASE=nvcr.io/nvidia/nemo:<tag> .
#
# nemo:26.06 holds Python 3.12 in /opt/venv, PyTorch 2.12 and Megatron-Core 0.18. The versions the tests run with are those
# of constraints.txt.
ARG BASE=nvcr.io/nvidia/nemo:26.06
FROM ${BASE}

ARG PYTHON=/opt/venv/bin/python
WORKDIR /opt/nemo_kto
COPY . .

# Of the tested versions, install only the packages that the container lacks, each without its dependencies: nothing that
# is there is replaced.
RUN ${PYTHON} - > /tmp/missing.txt <<'EOF'
import re
from importlib.metadata import PackageNotFoundError, version

for line in open("constraints.txt", encoding="utf-8"):
    name = re.match(r"[A-Za-z0-9._-]+", line)
    if name is None or name[0] in ("torch", "megatron-core", "hypothesis", "mypy", "pytest", "ruff"):
        continue
    try:
        version(name[0])
    except PackageNotFoundError:
        print(line.strip())
EOF
RUN uv pip install --python ${PYTHON} --no-cache --no-deps -r /tmp/missing.txt \
    && uv pip install --python ${PYTHON} --no-cache --no-deps .

# A container's package of a wrong version was left alone: say so now rather than in the middle of a job.
WORKDIR /workspace
RUN ${PYTHON} - <<'EOF'
from importlib.metadata import requires, version

from packaging.requirements import Requirement

wanted = [Requirement(line) for line in requires("nemo-kto") if "extra ==" not in line]
print("torch", version("torch"), "megatron-core", version("megatron-core"))
wrong = [f"{need}, found {version(need.name)}" for need in wanted if not need.specifier.contains(version(need.name), True)]
if wrong:
    raise SystemExit("this base image does not fit: " + "; ".join(wrong))
EOF

ENV PATH=/opt/venv/bin:${PATH}
