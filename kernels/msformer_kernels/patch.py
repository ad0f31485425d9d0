"""The command ``python -m msformer_kernels.patch MODULE:CALLABLE``; see `patching.command`.

`msformer_kernels.patch` is a function. Importing this file gives that function too: an import makes a submodule an
attribute of its package, under the name that the function has there.
"""

import sys

from msformer_kernels.patching import patch
from msformer_kernels.patching.command import main

if __name__ == "__main__":
    main()
else:
    sys.modules[__name__] = patch  # type: ignore[assignment]
