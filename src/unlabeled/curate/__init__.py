"""Curation: from a pile of uncurated images to a pretraining set, with a reason for every decision."""
