"""Readers and builders that the scenarios share.

* :mod:`~treelora_avalanche.scenarios.data.archives`: published archives, downloaded and checked;
* :mod:`~treelora_avalanche.scenarios.data.folders`: image files by class, for training and testing;
* :mod:`~treelora_avalanche.scenarios.data.images`: resized images as datasets, cached in memory;
* :mod:`~treelora_avalanche.scenarios.data.class_incremental`: a dataset split by class;
* :mod:`~treelora_avalanche.scenarios.data.task_file`: the classes of each task, listed in a file;
* :mod:`~treelora_avalanche.scenarios.data.limit`: fewer images of each experience;
* :mod:`~treelora_avalanche.scenarios.data.overlap`: equal samples for training and testing;
* :mod:`~treelora_avalanche.scenarios.data.names`: files and folders that are left out;
* :mod:`~treelora_avalanche.scenarios.data.text_files`: records in JSON, JSONL, CSV, Parquet;
* :mod:`~treelora_avalanche.scenarios.data.text_records`: prompts and answers of records;
* :mod:`~treelora_avalanche.scenarios.data.text_folder`: a folder of such files, by task;
* :mod:`~treelora_avalanche.scenarios.data.text_parts`: the tasks' records for training and testing;
* :mod:`~treelora_avalanche.scenarios.data.text_benchmark`: token sequences as a benchmark.
"""
