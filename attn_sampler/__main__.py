"""``python -m attn_sampler`` is the command ``attn-sampler``."""

from attn_sampler.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
