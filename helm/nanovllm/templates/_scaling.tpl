{{/* What a topic's records take, by keda's values: seconds of one worker for each. Called with (list $ topic). */}}
{{- define "nanovllm.secondsPerRecord" -}}
{{- $keda := (index . 0).Values.keda }}
{{- $events := include "nanovllm.eventsTopic" (index . 0) }}
{{- $isEvent := and $events (or (eq (index . 1) $events) (hasPrefix (printf "%s.retry-" $events) (index . 1))) }}
{{- if and $isEvent $keda.eventsLagThreshold }}
{{- divf (float64 $keda.secondsPerWorker) (float64 $keda.eventsLagThreshold) }}
{{- else if and $isEvent $keda.secondsPerEvent }}
{{- $keda.secondsPerEvent }}
{{- else if $keda.lagThreshold }}
{{- divf (float64 $keda.secondsPerWorker) (float64 $keda.lagThreshold) }}
{{- else }}
{{- $keda.secondsPerJob }}
{{- end }}
{{- end }}

{{/* Records of a topic that are the work of one worker. Called with (list $ topic). */}}
{{- define "nanovllm.jobsPerWorker" -}}
{{- $seconds := include "nanovllm.secondsPerRecord" . | float64 }}
{{- divf (float64 (index . 0).Values.keda.secondsPerWorker) $seconds | printf "%.6f" | float64 | ceil | int64 }}
{{- end }}

{{/* Name of the trigger of the consumed topic with that number. A formula reads `-` as minus. */}}
{{- define "nanovllm.lagTrigger" -}}
{{- ternary "lag" (printf "lag_%d" .) (eq . 0) }}
{{- end }}

{{/* Labels by which Prometheus finds the workers of this release, as in a selector of PromQL. */}}
{{- define "nanovllm.metricsSelector" -}}
{{- default (printf "namespace=%q,pod=~\"%s-.+\"" .Release.Namespace (include "nanovllm.fullname" .)) .Values.keda.prometheus.selector }}
{{- end }}

{{/* Seconds of a worker for a job: the time in which workers had work, by the jobs that ended meanwhile, where an event
     counts as so many as secondsPerEvent says. The histograms of a job's time would not do: a worker has many at once.
     Until jobs have ended, secondsPerJob. */}}
{{- define "nanovllm.secondsPerJobQuery" -}}
{{- $labels := include "nanovllm.metricsSelector" . }}
{{- $window := .Values.keda.prometheus.window }}
{{- $jobs := printf "sum(rate(nanovllm_jobs_total{%s,outcome!=\"returned\"}[%s]))" $labels $window }}
{{- $perJob := .Values.keda.secondsPerJob }}
{{- $events := include "nanovllm.eventsTopic" . }}
{{- if $events }}
{{- $more := subf (divf (include "nanovllm.secondsPerRecord" (list . $events) | float64) (float64 $perJob)) 1 }}
{{- if $more }}
{{- $jobs = printf "(%s + %v * (sum(rate(nanovllm_events_total{%s,outcome=~\"result|retry|dead_letter\"}[%s])) or vector(0)))" $jobs $more $labels $window }}
{{- end }}
{{- end }}
{{- printf "clamp_min(sum(1 - rate(nanovllm_engine_idle_seconds_total{%s,reason=\"empty\"}[%s])) / (%s > 0), 0.001) or vector(%v)" $labels $window $jobs $perJob }}
{{- end }}

{{/* The ScaledObject's scalingModifiers: all that waits, in seconds of work, of which each worker gets secondsPerWorker.
     With a measured job an event counts as so many jobs as secondsPerEvent says. */}}
{{- define "nanovllm.scalingModifiers" -}}
{{- $measured := ne .Values.keda.prometheus.serverAddress "" }}
{{- $perJob := float64 .Values.keda.secondsPerJob }}
{{- $terms := list }}
{{- range $number, $topic := include "nanovllm.consumedTopics" . | splitList "," }}
{{- $factor := include "nanovllm.secondsPerRecord" (list $ $topic) | float64 }}
{{- if $measured }}{{ $factor = divf $factor $perJob }}{{ end }}
{{- $name := include "nanovllm.lagTrigger" $number }}
{{- $terms = append $terms (ternary $name (printf "%s * %v" $name $factor) (eq $factor 1.0)) }}
{{- end }}
{{- $sum := join " + " $terms }}
formula: {{ ternary (printf "(%s) * seconds_per_job" $sum) $sum $measured | quote }}
target: {{ .Values.keda.secondsPerWorker | int64 | quote }}
activationTarget: {{ mulf (float64 .Values.keda.activationLagThreshold) $perJob | quote }}
metricType: AverageValue
{{- end }}

{{/* What must agree between values of scaling; called by nanovllm.check. */}}
{{- define "nanovllm.checkScaling" -}}
{{- $keda := .Values.keda }}
{{- $hpa := .Values.autoscaling.hpa }}
{{- if and $keda.enabled $hpa.enabled }}
{{- fail "keda.enabled and autoscaling.hpa.enabled exclude each other: two would set one number of workers. Set keda.enabled to false" }}
{{- end }}
{{- if and $hpa.enabled (gt (int $hpa.minReplicas) (int $hpa.maxReplicas)) }}
{{- fail "autoscaling.hpa.minReplicas is above autoscaling.hpa.maxReplicas" }}
{{- end }}
{{- $hasFormula := or (hasKey (default dict $keda.advanced) "scalingModifiers") (not $keda.extraTriggers) }}
{{- if and $keda.enabled $keda.excludePersistentLag $hasFormula (not $keda.minReplicaCount) }}
{{- fail "keda.excludePersistentLag counts no partition whose offset stands still, and with no worker all of them do: none would ever start. Leave it out, or set keda.minReplicaCount to 1" }}
{{- end }}
{{- if and $keda.enabled $keda.prometheus.serverAddress }}
{{- if contains "@" $keda.prometheus.serverAddress }}
{{- fail "keda.prometheus.serverAddress holds a user or a password, which would stand in the ScaledObject: take keda.prometheus.authenticationRef" }}
{{- end }}
{{- if $keda.lagThreshold }}
{{- fail (printf "keda.lagThreshold is %d messages, but keda.prometheus measures what a job takes: leave one of them out" (int64 $keda.lagThreshold)) }}
{{- end }}
{{- if $keda.limitToPartitionsWithLag }}
{{- fail "keda.limitToPartitionsWithLag counts messages, but keda.prometheus measures what a job takes: leave one of them out" }}
{{- end }}
{{- if and $keda.extraTriggers (not (hasKey (default dict $keda.advanced) "scalingModifiers")) }}
{{- fail "keda.prometheus needs a formula, and keda.extraTriggers has none: write keda.advanced.scalingModifiers over all triggers" }}
{{- end }}
{{- end }}
{{- if .Values.podDeletionCost.enabled }}
{{- if eq (include "nanovllm.serviceAccountName" .) "default" }}
{{- fail "podDeletionCost.enabled would let every pod of the namespace change pods: set serviceAccount.create, or name one of the workers' own" }}
{{- end }}
{{- if dig "kubernetes" "pod_deletion_cost" false .Values.settings }}
{{- fail "settings.kubernetes.pod_deletion_cost is set by podDeletionCost.enabled: leave it out" }}
{{- end }}
{{- end }}
{{- end }}
