"""`python -m vlmem_jax` is the command `vlmem`."""

from vlmem_jax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
