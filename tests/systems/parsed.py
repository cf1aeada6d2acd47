"""What the fork server imports last: every fork finds the parsers made that its command needs."""

import contextlib
import io

from stableqat.cli.main import main

with contextlib.redirect_stdout(io.StringIO()):
    for family in ("llama", "vit"):
        configs = [part for name in ("base", "debug", "stableqat") for part in ("-c", f"{family}/{name}")]
        assert main(["fit", *configs, "--print_config"]) == 0
