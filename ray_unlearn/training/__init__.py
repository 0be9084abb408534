"""One trial on one group of workers. The one owner of DeepSpeed is engine.py."""
