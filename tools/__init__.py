"""Commands, each `python -m tools.NAME`."""

try:
    import engine as engine  # its checks of the machine come before what a command imports itself
except ImportError as error:
    error.name = __name__  # under the package's own name `python -m` prints one line
    raise
