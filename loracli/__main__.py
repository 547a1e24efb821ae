"""The command `loracat`, and `python -m loracli`."""


def main() -> None:
    """The entry point. Ctrl-C may come while the commands are imported, which takes a moment."""
    try:
        from loracli.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
