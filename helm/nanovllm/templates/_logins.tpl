{{/* Variables of a container that speaks to brokers and stores: settings, and Secrets taken whole. */}}
{{- define "nanovllm.envFrom" -}}
- configMapRef:
    name: {{ include "nanovllm.fullname" . }}
{{- with .Values.existingSecret }}
- secretRef:
    name: {{ . }}
{{- end }}
{{- with .Values.extraEnvFrom }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Its variables by name: a home, and the logins at brokers and stores. */}}
{{- define "nanovllm.logins" -}}
# The root file system is read-only; libraries that write to a home write here.
- name: HOME
  value: /tmp
{{- with .Values.kafka.sasl }}
{{- if .existingSecret }}
- name: NANOVLLM_KAFKA__SASL_USERNAME
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .usernameKey }}
- name: NANOVLLM_KAFKA__SASL_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .passwordKey }}
{{- end }}
{{- end }}
{{- with .Values.kafka.tls }}
{{- if .existingSecret }}
- name: NANOVLLM_KAFKA__SSL_CAFILE
  value: /etc/nanovllm/kafka-tls/ca.crt
{{- if .certKey }}
- name: NANOVLLM_KAFKA__SSL_CERTFILE
  value: /etc/nanovllm/kafka-tls/tls.crt
- name: NANOVLLM_KAFKA__SSL_KEYFILE
  value: /etc/nanovllm/kafka-tls/tls.key
{{- if .keyPasswordKey }}
- name: NANOVLLM_KAFKA__SSL_KEY_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .keyPasswordKey }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.aws }}
{{- if .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .accessKeyIdKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .secretAccessKeyKey }}
{{- if .sessionTokenKey }}
- name: AWS_SESSION_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .sessionTokenKey }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "nanovllm.loginMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .Values.kafka.tls.existingSecret }}
- name: kafka-tls
  mountPath: /etc/nanovllm/kafka-tls
  readOnly: true
{{- end }}
{{- end }}

{{- define "nanovllm.loginVolumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmpSizeLimit }}
{{- with .Values.kafka.tls }}
{{- if .existingSecret }}
- name: kafka-tls
  secret:
    secretName: {{ .existingSecret }}
    defaultMode: 0440
    items:
      - {key: {{ .caKey }}, path: ca.crt}
      {{- if .certKey }}
      - {key: {{ .certKey }}, path: tls.crt}
      - {key: {{ .keyKey }}, path: tls.key}
      {{- end }}
{{- end }}
{{- end }}
{{- end }}
