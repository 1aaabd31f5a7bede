# NVIDIA's image brings torch, Transformer Engine, Apex, flash-attn, DALI and NCCL, built for one another: none of them is installed again.
FROM nvcr.io/nvidia/pytorch:26.05-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/megavlm

# Dependencies first: this layer is built again only when they change. torch is held at the image's own build.
COPY setup.py pyproject.toml LICENSE ./
COPY megavlm/__init__.py megavlm/
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/held.txt \
    && pip install --no-cache-dir --constraint /tmp/held.txt . \
    && pip uninstall --yes megavlm \
    && rm -rf /tmp/held.txt build ./*.egg-info

COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && useradd --uid 10001 --create-home --shell /bin/bash megavlm \
    && install --directory --owner=megavlm --group=megavlm /workspace/runs

USER 10001
WORKDIR /workspace
ENTRYPOINT ["megavlm"]
CMD ["doctor"]
