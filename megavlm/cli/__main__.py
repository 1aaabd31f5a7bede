"""`python -m megavlm.cli` is `megavlm`: what the launcher starts, since the script may not be on the path of a rank."""

from megavlm.cli.main import main

if __name__ == "__main__":
    main()
