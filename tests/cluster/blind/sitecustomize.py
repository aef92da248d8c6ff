"""Makes the Ray workers of a node blind to prepared data outside of its own cache, as if on a machine of its own."""

import os
import sys

if any("default_worker" in argument for argument in sys.orig_argv):
    from pathlib import Path

    from backdoorbench_mcl import datacache

    _intact = datacache.intact

    def _sees(folder: Path, name: str) -> bool:
        return folder.is_relative_to(os.environ["BBMCL_CACHE"]) and _intact(folder, name)

    datacache.intact = _sees
