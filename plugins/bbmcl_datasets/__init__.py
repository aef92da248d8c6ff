"""The data sets that ship with the toolkit: real images found on disk, and an embedded procedural default."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl

KRIZHEVSKY = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"
STALLKAMP = "Stallkamp et al. 2012, Man vs. computer: Benchmarking machine learning for traffic sign recognition"
RUSSAKOVSKY = "Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge"


@hookimpl
def bbmcl_datasets() -> list[Entry]:
    """The entries of this package."""
    return [
        Entry("shapes", "bbmcl_datasets.shapes:Shapes", "procedural toy images, the embedded default"),
        Entry("cifar10", "bbmcl_datasets.cifar:Cifar10", "10 classes, 3x32x32, found under the data root", KRIZHEVSKY),
        Entry(
            "cifar100", "bbmcl_datasets.cifar:Cifar100", "100 classes, 3x32x32, found under the data root", KRIZHEVSKY
        ),
        Entry("gtsrb", "bbmcl_datasets.gtsrb:Gtsrb", "43 traffic signs, 3x32x32, found under the data root", STALLKAMP),
        Entry(
            "imagenet20", "bbmcl_datasets.imagenet20:ImageNet20", "20 classes, 3x224x224, found likewise", RUSSAKOVSKY
        ),
        Entry("folder", "bbmcl_datasets.folder:Folder", "folder:PATH, an image folder with one sub-folder per class"),
        Entry("parquet", "bbmcl_datasets.parquet:Parquet", "parquet:PATH, <split>-*.parquet files of encoded images"),
    ]
