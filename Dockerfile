# The companion with all it needs: docker build -t s2d . && docker run --rm -it -p 8888:8888 s2d
# For one GPU: docker build --build-arg TORCH_BACKEND=cu128 -t s2d . && docker run --rm --gpus all ...
FROM python:3.11-slim-bookworm
ARG TORCH_BACKEND=cpu
RUN apt-get update && apt-get install -y --no-install-recommends git make rsync && rm -rf /var/lib/apt/lists/*
WORKDIR /s2d
# Packages first: a change of the sources does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY s2d/__init__.py s2d/
RUN make TORCH_BACKEND=${TORCH_BACKEND} setup
COPY . .
RUN touch .venv/installed
ENV PATH=/s2d/.venv/bin:$PATH
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--allow-root", "--no-browser", "notebooks"]
