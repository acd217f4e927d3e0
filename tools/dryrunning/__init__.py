"""Parts of tools/dryrun.py."""
