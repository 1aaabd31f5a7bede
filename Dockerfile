# NVIDIA's image brings torch, Transformer Engine, Apex, flash-attn, DALI, nvImageCodec and NCCL, built for one another: none of them is
# installed again. How to build and run it, also with enroot/pyxis and apptainer: docs/containers.md.
FROM nvcr.io/nvidia/pytorch:26.05-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/megavlm

# Dependencies first: this layer is built again only when they change. What the image has built itself is held at that very build, and the
# last line fails the build should anything have replaced torch.
COPY setup.py pyproject.toml LICENSE ./
COPY megavlm/__init__.py megavlm/
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/torch.txt \
    && pip list --format=freeze | { grep -iE '^(triton|pytorch-triton|transformer[-_]engine|apex|flash[-_]attn|nvidia[-_]dali|nvidia[-_]nvimgcodec|numpy)[^=]*==' || true; } \
        | cat /tmp/torch.txt - > /tmp/held.txt \
    && pip install --constraint /tmp/held.txt . \
    && pip uninstall --yes megavlm \
    && python -c "import torch; print('torch==' + torch.__version__)" | diff /tmp/torch.txt - \
    && rm -rf /tmp/torch.txt /tmp/held.txt build ./*.egg-info

COPY . .
RUN pip install --no-deps --editable . \
    && useradd --uid 10001 --create-home --shell /bin/bash megavlm \
    && install --directory --owner=megavlm --group=megavlm /workspace/runs

USER 10001
WORKDIR /workspace
ENTRYPOINT ["megavlm"]
CMD ["doctor"]
