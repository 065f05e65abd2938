{{/* Every topic that the workers read or write, and that of replayed dead letters: {name: {config, partitions}} as JSON.
     The configurations are those of `nanovllm topics create`; a test compares both. */}}
{{- define "nanovllm.allTopics" -}}
{{- $settings := .Values.settings -}}
{{- $largest := default 1048576 (dig "kafka" "max_request_bytes" nil $settings) | int64 -}}
{{- $carriesJobs := dict "max.message.bytes" (toString $largest) -}}
{{- /* 16384: what a retry or a dead letter adds to a job. Uncompressed: the limit bounds what a batch unpacks to. */ -}}
{{- $ofJobs := dict "max.message.bytes" (max 1 (sub $largest 16384) | toString) "compression.type" "uncompressed" -}}
{{- $day := 86400000 | int64 -}}
{{- $topics := dict -}}
{{- $events := include "nanovllm.eventsTopic" . -}}
{{- range $topic := concat (list $settings.topics.jobs) (keys (default dict $settings.topics.lanes)) (list $events) | compact -}}
{{- $_ := set $topics $topic (dict "config" $ofJobs) -}}
{{- range $delay := default list (dig "retries" "delays_s" nil $settings) -}}
{{- $keeps := add (mul 2000 (int64 $delay)) (mul 7 $day) | toString -}}
{{- $_ := set $topics (printf "%s.retry-%ds" $topic (int $delay)) (dict "config" (merge (dict "retention.ms" $keeps) $carriesJobs)) -}}
{{- end -}}
{{- end -}}
{{- range $topic := concat (list $settings.topics.results $settings.topics.metrics) .Values.kafkaTopics.extraTopics -}}
{{- $_ := set $topics $topic (dict "config" dict) -}}
{{- end -}}
{{- $_ := set $topics $settings.topics.dead_letters (dict "config" (merge (dict "retention.ms" (mul 28 $day | toString)) $carriesJobs)) -}}
{{- $compacted := dict "cleanup.policy" "compact" -}}
{{- if dig "dead_letters" "crash_limit" nil $settings -}}
{{- $marks := merge (dict "segment.ms" "3600000" "min.cleanable.dirty.ratio" "0.1") $compacted -}}
{{- $_ := set $topics (default "nanovllm.in-flight" $settings.topics.in_flight) (dict "config" $marks) -}}
{{- end -}}
{{- $_ := set $topics (default "nanovllm.replayed" $settings.topics.replayed) (dict "config" $compacted "partitions" 1) -}}
{{- toJson $topics -}}
{{- end }}

{{/* The name of the KafkaTopic object of a topic: its own where Kubernetes allows that, else one that no other topic gets. */}}
{{- define "nanovllm.topicObject" -}}
{{- if regexMatch "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$" . -}}
{{- . -}}
{{- else -}}
{{- printf "%s-%s" (regexReplaceAll "[^a-z0-9]+" (lower .) "-" | trunc 200 | trimAll "-" | default "topic") (sha256sum . | trunc 8) -}}
{{- end -}}
{{- end }}
