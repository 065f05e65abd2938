{{- define "nanovllm.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "nanovllm.fullname" -}}
{{- $name := include "nanovllm.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "nanovllm.selectorLabels" -}}
app.kubernetes.io/name: {{ include "nanovllm.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "nanovllm.labels" -}}
{{ include "nanovllm.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: worker
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "nanovllm.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "nanovllm.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "nanovllm.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* One setting's text. Strings stand as they are; the rest as JSON, because Helm reads every number as a float and
     would print 8589934592 as 8.589934592e+09. */}}
{{- define "nanovllm.settingText" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{/* NANOVLLM_SECTION__FIELD: "text" lines of .Values.settings; null means unset. */}}
{{- define "nanovllm.settings" -}}
{{- with include "nanovllm.packedBytes" . }}
NANOVLLM_ENGINE__PACKED_WEIGHTS_BYTES: {{ . | quote }}
{{- end }}
{{- range $section, $fields := .Values.settings }}
{{- if kindIs "map" $fields }}
{{- range $field, $value := $fields }}
{{- if not (kindIs "invalid" $value) }}
NANOVLLM_{{ upper $section }}__{{ upper $field }}: {{ include "nanovllm.settingText" $value | quote }}
{{- end }}
{{- end }}
{{- else if not (kindIs "invalid" $fields) }}
NANOVLLM_{{ upper $section }}: {{ include "nanovllm.settingText" $fields | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "nanovllm.drainSeconds" -}}
{{- $admission := default dict .Values.settings.admission }}
{{- default 25 $admission.drain_timeout_s | ceil | int }}
{{- end }}

{{/* Seconds to give back, publish, commit and leave the group, after the drain; a test compares it with the worker's limits. */}}
{{- define "nanovllm.commitSeconds" -}}15{{- end }}

{{- define "nanovllm.graceSeconds" -}}
{{- $drain := include "nanovllm.drainSeconds" . | int }}
{{- $commit := include "nanovllm.commitSeconds" . | int }}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds }}
{{- add $drain 30 }}
{{- else }}
{{- $grace := int .Values.terminationGracePeriodSeconds }}
{{- if le $grace (add $drain $commit | int) }}
{{- fail (printf "terminationGracePeriodSeconds (%d) must be above settings.admission.drain_timeout_s (%d) and %d more to commit: a worker killed before repeats its jobs. Raise it, or set it to null" $grace $drain $commit) }}
{{- end }}
{{- $grace }}
{{- end }}
{{- end }}

{{/* Seconds of a start until the model is loaded. Measured: under 2 s without weights, 5 to 15 s with small models (docs/deploy.md). */}}
{{- define "nanovllm.loadSeconds" -}}
{{- $backend := include "nanovllm.backend" . }}
{{- if not (kindIs "invalid" .Values.probes.startup.seconds) }}
{{- int .Values.probes.startup.seconds }}
{{- else if not (include "nanovllm.loadsWeights" .) }}1
{{- else if or (has $backend (list "generic" "vllm")) .Values.model.s3.uri (dig "engine" "model" "" .Values.settings) }}300
{{- else }}3
{{- end }}
{{- end }}

{{/* Seconds that the startup probe waits. */}}
{{- define "nanovllm.startupSeconds" -}}
{{- max (ternary 180 60 (eq (include "nanovllm.loadsWeights" .) "true")) (mul 3 (include "nanovllm.loadSeconds" . | int)) }}
{{- end }}

{{- define "nanovllm.startupAttempts" -}}
{{- divf (include "nanovllm.startupSeconds" .) .Values.probes.startup.periodSeconds | ceil | int }}
{{- end }}

{{- define "nanovllm.smokeSeconds" -}}
{{- default (add 120 (include "nanovllm.startupSeconds" . | int)) .Values.smokeTest.timeoutSeconds | int }}
{{- end }}

{{/* The most workers that there may be. */}}
{{- define "nanovllm.mostWorkers" -}}
{{- $hpa := dig "hpa" dict (default dict .Values.autoscaling) }}
{{- ternary .Values.keda.maxReplicaCount (ternary $hpa.maxReplicas .Values.replicaCount (default false $hpa.enabled)) .Values.keda.enabled | int }}
{{- end }}

{{- define "nanovllm.hasModelVolume" -}}
{{- if or .Values.model.existingClaim .Values.model.volume .Values.model.s3.uri }}true{{ end }}
{{- end }}

{{/* Where the copy of model.s3.uri lies. */}}
{{- define "nanovllm.copiedModel" -}}
{{- printf "%s/%s" (trimSuffix "/" .Values.model.mountPath) (trimSuffix "/" .Values.model.s3.uri | base) }}
{{- end }}

{{/* The bytes of a quantity such as 16Gi. */}}
{{- define "nanovllm.bytes" -}}
{{- $number := regexFind "^[0-9.]+" . }}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 }}
{{- mulf (float64 $number) (get $units (trimPrefix $number .)) | int64 }}
{{- end }}

{{/* Bytes of packed weights that an emptyDir may hold; empty: the worker's own limit. A pod whose emptyDir grows above its
     limit is evicted, and a file that replaces another lies beside it. */}}
{{- define "nanovllm.packedBytes" -}}
{{- if and (has (include "nanovllm.backend" .) (list "auto" "native" "generic")) (not .Values.cache.existingClaim) (kindIs "invalid" (dig "engine" "packed_weights_bytes" nil .Values.settings)) }}
{{- div (include "nanovllm.bytes" .Values.cache.sizeLimit | int64) 2 }}
{{- end }}
{{- end }}

{{/* engine.backend of the settings. */}}
{{- define "nanovllm.backend" -}}
{{- default "auto" (default dict .Values.settings.engine).backend }}
{{- end }}

{{/* Whether the backend loads weights: "true" or empty. */}}
{{- define "nanovllm.loadsWeights" -}}
{{- if not (has (include "nanovllm.backend" .) (list "openai" "echo")) }}true{{ end }}
{{- end }}

{{/* Whether a volume holds the CA of the servers: "true" or empty. */}}
{{- define "nanovllm.remoteCa" -}}
{{- if or .Values.remote.ca.existingSecret .Values.remote.ca.existingConfigMap }}true{{ end }}
{{- end }}

{{/* What the backend takes and does not take; called by nanovllm.check. */}}
{{- define "nanovllm.checkBackend" -}}
{{- $backend := include "nanovllm.backend" . }}
{{- $resources := merge (dict) (default dict .Values.resources.requests) (default dict .Values.resources.limits) }}
{{- if not (include "nanovllm.loadsWeights" .) }}
{{- if .Values.gpu.count }}
{{- fail (printf "gpu.count is %d, but settings.engine.backend is %s, which computes nothing: set it to 0" (int .Values.gpu.count) $backend) }}
{{- end }}
{{- range $name, $amount := $resources }}
{{- if or (eq $name $.Values.gpu.resourceName) (regexMatch "gpu|^nvidia\\.com/" $name) }}
{{- fail (printf "resources name %s, but settings.engine.backend is %s, which computes nothing: leave it out" $name $backend) }}
{{- end }}
{{- end }}
{{- if or .Values.model.existingClaim .Values.model.volume }}
{{- fail (printf "model.existingClaim or model.volume is set, but settings.engine.backend is %s, which reads no weights: leave it out" $backend) }}
{{- end }}
{{- end }}
{{- if and (has $backend (list "auto" "native" "generic")) (gt (int .Values.gpu.count) 1) }}
{{- fail (printf "gpu.count is %d, but settings.engine.backend is %s, which computes on one: set it to 1, or take a backend for several" (int .Values.gpu.count) $backend) }}
{{- end }}
{{- $vllm := default dict .Values.settings.vllm }}
{{- $needed := mul (default 1 $vllm.tensor_parallel_size) (default 1 $vllm.pipeline_parallel_size) | int }}
{{- if and (eq $backend "vllm") (ne (default "" $vllm.distributed_executor_backend) "ray") .Values.gpu.count (lt (int .Values.gpu.count) $needed) }}
{{- fail (printf "gpu.count is %d, but settings.vllm divides the model among %d GPUs: raise it, or take distributed_executor_backend ray for several machines" (int .Values.gpu.count) $needed) }}
{{- end }}
{{- if and (ne $backend "vllm") (gt $needed 1) }}
{{- fail (printf "settings.vllm divides the model among %d GPUs, but settings.engine.backend is %s: set it to vllm, or leave settings.vllm out" $needed $backend) }}
{{- end }}
{{- $engine := default dict .Values.settings.engine }}
{{- range $name, $default := get (include "nanovllm.refusedEngineSettings" . | fromJson) $backend | default dict }}
{{- $value := get $engine $name }}
{{- if and (hasKey $engine $name) (not (kindIs "invalid" $value)) (ne (toJson $value) (toJson $default)) }}
{{- fail (printf "settings.engine.%s is set, which the backend %s has not: leave it out" $name $backend) }}
{{- end }}
{{- end }}
{{- $endpoints := default list (default dict .Values.settings.remote).endpoints }}
{{- if and (eq $backend "openai") (not $endpoints) }}
{{- fail "settings.engine.backend is openai, and settings.remote.endpoints is empty: name the servers" }}
{{- end }}
{{- $isSecure := false }}
{{- range $number, $url := $endpoints }}
{{- if contains "@" $url }}
{{- fail (printf "settings.remote.endpoints: number %d holds a user or a password, which would stand in a ConfigMap: take remote.apiKeys.existingSecret" (add $number 1)) }}
{{- end }}
{{- if hasPrefix "https://" $url }}{{ $isSecure = true }}{{ end }}
{{- end }}
{{- if contains "@" (default "" (default dict .Values.settings.remote).proxy) }}
{{- fail "settings.remote.proxy holds a user or a password, which would stand in a ConfigMap, and which no proxy is given" }}
{{- end }}
{{- if ne $backend "openai" }}
{{- if or $endpoints .Values.remote.apiKeys.existingSecret (include "nanovllm.remoteCa" .) }}
{{- fail (printf "servers, API keys or a CA of theirs are named, but settings.engine.backend is %s: nothing would be asked of them. Set it to openai, or leave settings.remote.endpoints and remote out" $backend) }}
{{- end }}
{{- else if and (include "nanovllm.remoteCa" .) (not $isSecure) }}
{{- fail "remote.ca is set, but no endpoint of settings.remote.endpoints begins with https: it would never be used" }}
{{- end }}
{{- if and .Values.remote.ca.existingSecret .Values.remote.ca.existingConfigMap }}
{{- fail "remote.ca.existingSecret and remote.ca.existingConfigMap exclude each other" }}
{{- end }}
{{- if and (include "nanovllm.remoteCa" .) (default dict .Values.settings.remote).ca_file }}
{{- fail "settings.remote.ca_file is set by remote.ca: leave it out" }}
{{- end }}
{{- end }}

{{/* What must agree between values; called by the Deployment. */}}
{{- define "nanovllm.check" -}}
{{- include "nanovllm.checkBackend" . }}
{{- include "nanovllm.refusals" . }}
{{- range .Values.extraEnv }}
{{- if and .value (regexMatch "(KEYS?|PASSWORD|PASSWD|PASS|_PW|SECRET|TOKEN|CONNECTION_STRING|JAAS_CONFIG|OTLP(_TRACES)?_HEADERS)$" (upper .name)) }}
{{- fail (printf "extraEnv: %s is a secret, and its value would stand in the Deployment: take valueFrom.secretKeyRef" .name) }}
{{- end }}
{{- if and .value (or (regexMatch "^NANOVLLM_.*__" .name) (and (hasPrefix "NANOVLLM_" .name) (hasPrefix "{" (trim .value)))) }}
{{- fail (printf "extraEnv: %s is a setting, which other objects of the chart read and Helm checks: write it among settings, as section and field" .name) }}
{{- end }}
{{- end }}
{{- $protocol := default "PLAINTEXT" .Values.settings.kafka.security_protocol }}
{{- if and .Values.kafka.sasl.existingSecret (not (hasPrefix "SASL_" $protocol)) }}
{{- fail (printf "kafka.sasl.existingSecret is set, but settings.kafka.security_protocol is %s: the password would never be used" $protocol) }}
{{- end }}
{{- if and .Values.kafka.tls.existingSecret (not (hasSuffix "SSL" $protocol)) }}
{{- fail (printf "kafka.tls.existingSecret is set, but settings.kafka.security_protocol is %s: the connection would not be encrypted" $protocol) }}
{{- end }}
{{- if ne (empty .Values.kafka.tls.certKey) (empty .Values.kafka.tls.keyKey) }}
{{- fail "kafka.tls.certKey and kafka.tls.keyKey go together" }}
{{- end }}
{{- if and .Values.keda.enabled (gt (int .Values.keda.minReplicaCount) (int .Values.keda.maxReplicaCount)) }}
{{- fail "keda.minReplicaCount is above keda.maxReplicaCount" }}
{{- end }}
{{- include "nanovllm.checkScaling" . }}
{{- $most := include "nanovllm.mostWorkers" . | int }}
{{- if and .Values.settings.kafka.group_instance_id (gt $most 1) }}
{{- fail (printf "settings.kafka.group_instance_id is one for all pods of a Deployment, of which there may be %d: each would take the others' place in the group. Leave it out" $most) }}
{{- end }}
{{- if and .Values.model.existingClaim .Values.model.volume }}
{{- fail "model.existingClaim and model.volume exclude each other" }}
{{- end }}
{{- if and .Values.routes.existingConfigMap (or .Values.routes.file .Values.routes.files) }}
{{- fail "routes.existingConfigMap and routes.file exclude each other: what that one names belongs into it" }}
{{- end }}
{{- if and .Values.routes.files (not .Values.routes.file) }}
{{- fail "routes.files are named by routes.file, which is empty" }}
{{- end }}
{{- if and (include "nanovllm.routesConfigMap" .) (dig "documents" "routes" "" .Values.settings) }}
{{- fail "settings.documents.routes is set by routes.file and routes.existingConfigMap: leave it out" }}
{{- end }}
{{- end }}

{{/* KEDA's word for the SASL mechanism. */}}
{{- define "nanovllm.kedaSasl" -}}
{{- $words := dict "PLAIN" "plaintext" "SCRAM-SHA-256" "scram_sha256" "SCRAM-SHA-512" "scram_sha512" }}
{{- $mechanism := default "" .Values.settings.kafka.sasl_mechanism }}
{{- if not (hasKey $words $mechanism) }}
{{- fail (printf "keda: no trigger authentication can be made for settings.kafka.sasl_mechanism %q; name one in keda.authenticationRef" $mechanism) }}
{{- end }}
{{- get $words $mechanism }}
{{- end }}

{{/* Whether the chart makes the TriggerAuthentication: "true" or empty. */}}
{{- define "nanovllm.makesTriggerAuthentication" -}}
{{- if and .Values.keda.enabled (not .Values.keda.authenticationRef.name) (or .Values.kafka.sasl.existingSecret .Values.kafka.tls.existingSecret) }}true{{ end }}
{{- end }}

{{/* The ConfigMap that holds the routes; empty: none does. */}}
{{- define "nanovllm.routesConfigMap" -}}
{{- if .Values.routes.file }}{{ include "nanovllm.fullname" . }}-routes{{ else }}{{ .Values.routes.existingConfigMap }}{{ end }}
{{- end }}

{{/* The routes and the files that they name, as a ConfigMap's data. */}}
{{- define "nanovllm.routesData" -}}
{{- toYaml (merge (dict "routes.yaml" .Values.routes.file) .Values.routes.files) }}
{{- end }}

{{/* The topic of events, where the workers read it; else empty. */}}
{{- define "nanovllm.eventsTopic" -}}
{{- if or (include "nanovllm.routesConfigMap" .) (dig "documents" "routes" "" .Values.settings) -}}
{{- default "nanovllm.events" .Values.settings.topics.events -}}
{{- end -}}
{{- end }}

{{/* Every topic that the workers read: jobs, the lanes, events, and the retry topics of each. */}}
{{- define "nanovllm.consumedTopics" -}}
{{- $lanes := keys (default dict .Values.settings.topics.lanes) | sortAlpha -}}
{{- $read := concat (list .Values.settings.topics.jobs) $lanes (list (include "nanovllm.eventsTopic" .)) | compact -}}
{{- $topics := $read -}}
{{- range $topic := $read -}}
{{- range $delay := dig "retries" "delays_s" list $.Values.settings -}}
{{- $topics = append $topics (printf "%s.retry-%ds" $topic (int $delay)) -}}
{{- end -}}
{{- end -}}
{{- join "," $topics -}}
{{- end -}}
