"""Network families shipped with the toolkit. Free of torch: a class is imported when it is used."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_models() -> list[Entry]:
    return [
        Entry(
            "wrn",
            "bbmcl_models.wrn:WRN",
            "wide residual networks wrn-DEPTH-WIDEN, as in wrn-16-1",
            "Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016",
        ),
        Entry(
            "resnet18",
            "bbmcl_models.resnet:ResNet18",
            "ResNet-18 with a stem for small or for large images",
            "He et al., Deep Residual Learning for Image Recognition, CVPR 2016",
        ),
        Entry(
            "preactresnet18",
            "bbmcl_models.preact:PreActResNet18",
            "pre-activation ResNet-18 with a stem for small images",
            "He et al., Identity Mappings in Deep Residual Networks, ECCV 2016",
        ),
        Entry(
            "torchvision",
            "bbmcl_models.families:Torchvision",
            "classification networks of torchvision, untrained: torchvision:NAME, as in torchvision:resnet50",
        ),
        Entry(
            "timm",
            "bbmcl_models.families:Timm",
            "networks of timm, untrained: timm:NAME, as in timm:resnet18d (needs the extra timm)",
        ),
    ]
