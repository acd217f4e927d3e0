"""Parts of tools/dryrun."""
