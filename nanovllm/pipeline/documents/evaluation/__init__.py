"""Evaluation of document records beside their truths: coverage, fields, lists, intervals. Without torch."""
