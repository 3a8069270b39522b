#!/bin/sh
cut -d " " -f 1 access.log | sort | uniq -c | sort -rn | head -n 3 | awk '{print $2}' > top.txt
