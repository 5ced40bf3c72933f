"""Run the sweep."""

from benchmarks.contrastive.sweep import main

if __name__ == "__main__":
    main()
