"""Packaging of Twinpool. Exact versions that were tested together stand in constraints.txt."""

import os

from setuptools import Extension, find_packages, setup

# Lower bounds are what the code was written against; upper bounds stand where a major release is known to break.
INSTALL_REQUIRES = [
    "torch>=2.13",  # tensors, and the reference attention and linear layers
    "transformers>=5,<6",  # model classes; 5 has the AttentionInterface that paged attention plugs into
    "ray>=2.56",  # places and supervises workers; the plain package, its dashboard extra is not used
    "numpy>=2",  # buffers between tensors, GGUF and the wire
    "grpcio>=1.85.1,<2",  # KV handoff and token streams; at least the version that the stubs were written by
    "protobuf>=7.35.1,<8",  # message runtime; the stubs of grpcio-tools 1.85 refuse an older one
    "safetensors>=0.8",  # reads and writes checkpoints without pickle
    "tokenizers>=0.23",  # text to tokens and back
    "jinja2>=3.1",  # its errors, when a chat template refuses a conversation
    "huggingface_hub>=2,<3",  # fetches checkpoints by hub id
    "fastapi>=0.165",  # the HTTP API
    "uvicorn>=0.54",  # serves it
    "orjson>=3.11",  # JSON of the token stream
    "pydantic>=2.12,<3",  # request bodies and configuration, checked
    "pydantic-settings>=2.12",  # one schema for flags, environment and YAML
    "PyYAML>=6",  # reads the YAML
    "prometheus-client>=0.22",  # /metrics
    "xxhash>=3.6",  # checksum of every KV chunk
    "cryptography>=46",  # makes the certificates of --grpc-tls
    "psutil>=7",  # cores, memory and child processes of this machine
    "rich>=14",  # tables of the command line
    "tqdm>=4.67",  # progress of downloads and conversions
    "aiohttp>=3.12",  # HTTP client of the load generator
]

DEV_REQUIRES = [
    "pytest>=9",
    "pytest-timeout>=2.4",  # a hang fails with every thread's stack instead of holding CI up
    "hypothesis>=6.150",  # property tests of pools, queues and the wire format
    "ruff>=0.15",  # lint and format
    "mypy>=1.19",
    "gguf>=0.19",  # writes the GGUF files of tests, and is the reference for what we read from them
    "types-PyYAML",  # stubs of packages that ship none
    "types-tqdm",
    "types-psutil",
    "types-protobuf",
    "types-grpcio",
    "grpcio-tools==1.85.1",  # exact: the checked-in stubs are compared byte for byte and name this version
    "httpx>=0.28",  # drives the API in process
    "openai>=2",  # end-to-end tests talk to the server as its users do
    "pre-commit>=4",
]

# CUDA kernels of paged attention, for an ordinary (CUDA) build of torch. 0.7.2 is what the code was written against; it
# compiles what it needs on first use, with the CUDA toolkit's nvcc. Without it a GPU runs the portable attention.
GPU_REQUIRES = ["flashinfer-python>=0.7.2,<0.8"]

# Mooncake's transfer engine, for --kv-transfer-port rdma. It needs libibverbs of the system. The variant without CUDA,
# for what it moves here lies in host memory.
RDMA_REQUIRES = ["mooncake-transfer-engine-non-cuda>=0.3.13,<0.4"]

PLOTS_REQUIRES = ["matplotlib>=3.10"]  # the picture of `twinpool probe --output`

# One build of the native decoder per instruction set; workers/native/library.py chooses at run time. Where there is
# no compiler, or not this kind of processor, the build is skipped and the portable code serves.
NATIVE_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast"]
NATIVE_BUILDS = {
    "decoder_avx2": ["-march=x86-64-v3"],
    "decoder_avx512": ["-march=x86-64-v4"],
    "decoder_avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "decoder_avx512_vnni_bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
}
NATIVE_HEADERS = (
    "vectors",
    "packed",
    "activations",
    "products",
    "linear",
    "interface",
    "waiting",
    "team",
    "norms",
    "kv_cache",
    "decode_attention",
    "prompt_attention",
    "attention",
    "all_reduce",
    "likeliest",
    "draw",
    "limits",
    "decoder",
    "step",
)
EXTENSIONS = [
    Extension(
        f"workers.native.{name}",
        ["workers/native/decoder.cpp"],
        depends=[f"workers/native/{header}.h" for header in NATIVE_HEADERS],
        extra_compile_args=[*NATIVE_FLAGS, *instructions],
        extra_link_args=["-fopenmp"],
        language="c++",
        optional=True,
    )
    for name, instructions in NATIVE_BUILDS.items()
]

setup(
    name="twinpool",
    version="0.1.0",
    description="A disaggregated prefill/decode serving engine for large language models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["kvcache*", "scheduler*", "workers*", "engine*", "benchmarks*"]),
    package_data={"": ["*.proto", "*.pyi", "*.h", "device_profiles.yaml"]},
    ext_modules=EXTENSIONS,
    options={"build_ext": {"parallel": os.cpu_count()}},
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "dev": [*DEV_REQUIRES, *PLOTS_REQUIRES],
        "gpu": GPU_REQUIRES,
        "plots": PLOTS_REQUIRES,
        "rdma": RDMA_REQUIRES,
    },
    entry_points={"console_scripts": ["twinpool = engine.cli:main"]},
)
