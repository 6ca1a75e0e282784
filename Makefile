# Everything is in lab.sh (`sh lab.sh repro` works where there is no make). PYTHON=/path/to/python3.11 chooses another Python.
.PHONY: repro test check lab clean setup smoke bases bench list
repro test check lab clean setup smoke bases bench list:
	@sh lab.sh $@
