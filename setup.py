"""The C parts of the package; everything else about it is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "unlabeled.pretrain._pixels",
            ["src/unlabeled/pretrain/_pixels.c"],
            # What the compiler may not assume by itself and needs to vectorise rounding and selection.
            extra_compile_args=[
                "-O3",
                "-std=c11",
                "-fno-wrapv",  # Python adds -fwrapv, which makes these loops 3.5 times slower
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffinite-math-only",
                "-fno-signed-zeros",
                "-ffp-contract=fast",
            ],
        ),
        Extension(
            "unlabeled.curate._near",
            ["src/unlabeled/curate/_near.c"],
            extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off"],
        ),
    ]
)
