"""One file a library: a DPO step and sampling, as that library does them best."""
