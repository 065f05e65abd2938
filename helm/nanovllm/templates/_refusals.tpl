{{/* Values that contradict one another or that no worker could use; called by nanovllm.check. Each message names the value and
     what to do. */}}
{{- define "nanovllm.refusals" -}}
{{- include "nanovllm.refuseSecrets" . }}
{{- include "nanovllm.refuseModel" . }}
{{- include "nanovllm.refuseScaling" . }}
{{- include "nanovllm.refusePod" . }}
{{- end }}

{{/* Secrets that would stand in a ConfigMap or in the Deployment. */}}
{{- define "nanovllm.refuseSecrets" -}}
{{- $secrets := include "nanovllm.secretSettings" . | fromJson }}
{{- range $section, $fields := .Values.settings }}
{{- if kindIs "map" $fields }}
{{- range $field, $value := $fields }}
{{- $remedy := get $secrets (printf "%s.%s" $section $field) }}
{{- if and $remedy (not (kindIs "invalid" $value)) }}
{{- fail (printf "settings.%s.%s is a secret, and would stand in a ConfigMap: take %s" $section $field $remedy) }}
{{- end }}
{{- if regexMatch "://[^/\\s\"]*@" (include "nanovllm.settingText" $value) }}
{{- fail (printf "settings.%s.%s is a URL with a user or a password, which would stand in a ConfigMap: take them out, and give logins by a Secret" $section $field) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if regexMatch "://[^/\\s]*@" (default "" .value) }}
{{- fail (printf "extraEnv: %s is a URL with a user or a password, which would stand in the Deployment: take valueFrom.secretKeyRef" .name) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "nanovllm.refuseModel" -}}
{{- if .Values.model.s3.uri }}
{{- if not (include "nanovllm.loadsWeights" .) }}
{{- fail (printf "model.s3.uri is set, but settings.engine.backend is %s, which reads no weights: leave it out" (include "nanovllm.backend" .)) }}
{{- end }}
{{- if dig "engine" "model" "" .Values.settings }}
{{- fail "settings.engine.model is set by model.s3.uri: leave it out" }}
{{- end }}
{{- end }}
{{- if eq .Values.cache.mountPath .Values.model.mountPath }}
{{- fail (printf "cache.mountPath and model.mountPath are both %s: give the cache another path" .Values.cache.mountPath) }}
{{- end }}
{{- end }}

{{- define "nanovllm.refuseScaling" -}}
{{- $load := include "nanovllm.loadSeconds" . | int }}
{{- $cooldown := int .Values.keda.cooldownPeriod }}
{{- if and .Values.keda.enabled (not .Values.keda.minReplicaCount) (lt $cooldown $load) }}
{{- fail (printf "keda.cooldownPeriod (%d) is shorter than a start (probes.startup.seconds, %d here): the last worker would go sooner than another one loads the model. Raise it, or set probes.startup.seconds to what was measured" $cooldown $load) }}
{{- end }}
{{- with .Values.kafkaTopics }}
{{- if and .enabled (not .cluster) }}
{{- fail "kafkaTopics.enabled needs kafkaTopics.cluster, the name of Strimzi's Kafka resource" }}
{{- end }}
{{- if and .enabled (not .partitions) }}
{{- fail "kafkaTopics.enabled needs kafkaTopics.partitions, the most workers that shall have work at once" }}
{{- end }}
{{- $inSync := int (get .config "min.insync.replicas") }}
{{- if and .enabled (lt (int .replicas) $inSync) }}
{{- fail (printf "kafkaTopics.replicas (%d) is below min.insync.replicas (%d) of kafkaTopics.config: nothing could be written. Raise it, or lower the other" (int .replicas) $inSync) }}
{{- end }}
{{- end }}
{{- $most := include "nanovllm.mostWorkers" . | int }}
{{- with .Values.kafkaTopics.partitions }}
{{- if and (lt (int .) $most) (not $.Values.keda.allowIdleConsumers) }}
{{- fail (printf "kafkaTopics.partitions (%d) is below the most workers (%d): a partition has one worker, and the others would idle. Raise it, or lower the most workers" (int .) $most) }}
{{- end }}
{{- end }}
{{- if gt (default 1 .Values.settings.replicas | int) 1 }}
{{- fail (printf "settings.replicas is %d: a pod is one worker, and its probes see one. Leave it out, and raise keda.maxReplicaCount or replicaCount" (int .Values.settings.replicas)) }}
{{- end }}
{{- end }}

{{- define "nanovllm.refusePod" -}}
{{- $host := default "" .Values.settings.http.host }}
{{- if or (eq $host "localhost") (hasPrefix "127." $host) (eq $host "::1") }}
{{- fail (printf "settings.http.host is %s: probes and Prometheus come from outside of the pod. Leave it out" $host) }}
{{- end }}
{{- if and .Values.podDisruptionBudget.enabled (has (toString .Values.podDisruptionBudget.maxUnavailable) (list "0" "0%")) }}
{{- fail "podDisruptionBudget.maxUnavailable is 0: no node that has a worker could be drained. Set it to 1 or more" }}
{{- end }}
{{- if or (eq (toString (get .Values.podSecurityContext "runAsUser")) "0") (eq (toString (get .Values.securityContext "runAsUser")) "0") }}
{{- fail "podSecurityContext or securityContext has runAsUser 0: a worker needs no root. Leave it out for the image's user, 65532" }}
{{- end }}
{{- range $right := list "privileged" "allowPrivilegeEscalation" }}
{{- if get $.Values.securityContext $right }}
{{- fail (printf "securityContext.%s is true: a worker needs no such right. Leave it out" $right) }}
{{- end }}
{{- end }}
{{- end }}
