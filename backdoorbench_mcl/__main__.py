"""`python -m backdoorbench_mcl`, where the command `bbmcl` is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
