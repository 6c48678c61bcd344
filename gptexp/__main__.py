"""What there is: `python -m gptexp`."""

import sys

TEXT = """\
gptexp, a laboratory for small GPTs. Its commands:

    python -m gptexp.train      train a variant, or with -m every combination of several
    python -m gptexp.sample     write text with a trained model
    python -m gptexp.compare    say which variants of a sweep are better, with a report
    python -m gptexp.audit      ask what a variant's predictions depend on
    python -m gptexp.dashboard  make a W&B workspace that compares variants

    python -m gptexp.train norm=rmsnorm heads=h8
    python -m gptexp.train -m norm=layernorm,rmsnorm seed=1,2,3

Each explains itself with --help."""

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0] not in ("-h", "--help"):
        meant = " ".join(words)
        print(f"error: {meant}: write python -m gptexp.{meant}", file=sys.stderr)
        sys.exit(2)
    print(TEXT)
