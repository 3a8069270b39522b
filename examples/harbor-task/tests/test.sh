#!/bin/sh
# Harbor copies this folder to /tests when the agent is done, runs this script, and reads the reward that it writes.
if cmp /app/top.txt /tests/expected.txt; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
