{{- define "pdtrim.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 38 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 38 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 38 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "pdtrim.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "pdtrim.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* What tells the pods of this release, and of one component of it. Takes {root, component, pool}. */}}
{{- define "pdtrim.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .pool }}
pdtrim.io/pool: {{ . }}
{{- end }}
{{- end }}

{{/* Takes {root, component, pool}. */}}
{{- define "pdtrim.labels" -}}
{{ include "pdtrim.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Takes {root, image}. */}}
{{- define "pdtrim.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest | quote -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) | quote -}}
{{- end -}}
{{- end }}

{{/* The Secret that holds a server's address or keys: the user's, or what the chart bundles. Takes {root, own, bundled}. */}}
{{- define "pdtrim.secret" -}}
{{- if .bundled.enabled -}}
{{- include "pdtrim.fullname" .root }}-bundled
{{- else -}}
{{- .own.existingSecret -}}
{{- end -}}
{{- end }}

{{/* An environment variable from a Secret. Takes {name, secret, key}. */}}
{{- define "pdtrim.secretVariable" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}
{{- end }}

{{- define "pdtrim.databaseVariable" -}}
{{- $secret := include "pdtrim.secret" (dict "root" . "own" .Values.database "bundled" .Values.bundled.postgresql) -}}
{{- $key := .Values.bundled.postgresql.enabled | ternary "PDTRIM_DATABASE_URL" .Values.database.key -}}
{{- include "pdtrim.secretVariable" (dict "name" "PDTRIM_DATABASE_URL" "secret" $secret "key" $key) }}
{{- end }}

{{- define "pdtrim.apiKeyVariable" -}}
{{- $secret := include "pdtrim.secret" (dict "root" . "own" .Values.apiKey "bundled" .Values.bundled.apiKey) -}}
{{- $key := .Values.bundled.apiKey.enabled | ternary "PDTRIM_API_KEY" .Values.apiKey.key -}}
{{- if $secret }}
{{- include "pdtrim.secretVariable" (dict "name" "PDTRIM_API_KEY" "secret" $secret "key" $key) }}
{{- end }}
{{- end }}

{{- define "pdtrim.sessionVariable" -}}
{{- $secret := include "pdtrim.secret" (dict "root" . "own" .Values.session "bundled" .Values.bundled.apiKey) -}}
{{- $key := .Values.bundled.apiKey.enabled | ternary "PDTRIM_SESSION_SECRET" .Values.session.key -}}
{{- if $secret }}
{{- include "pdtrim.secretVariable" (dict "name" "PDTRIM_SESSION_SECRET" "secret" $secret "key" $key) }}
{{- end }}
{{- end }}

{{/* What every process of the service reads from Secrets. */}}
{{- define "pdtrim.secretVariables" -}}
{{- $bundled := .Values.bundled -}}
{{- include "pdtrim.databaseVariable" . }}
{{ include "pdtrim.secretVariable" (dict
  "name" "PDTRIM_BROKER_URL"
  "secret" (include "pdtrim.secret" (dict "root" . "own" .Values.broker "bundled" $bundled.valkey))
  "key" ($bundled.valkey.enabled | ternary "PDTRIM_BROKER_URL" .Values.broker.key)) }}
{{- $store := include "pdtrim.secret" (dict "root" . "own" .Values.store "bundled" $bundled.store) -}}
{{- if $store }}
{{ include "pdtrim.secretVariable" (dict
  "name" "AWS_ACCESS_KEY_ID" "secret" $store
  "key" ($bundled.store.enabled | ternary "AWS_ACCESS_KEY_ID" .Values.store.accessKeyIdKey)) }}
{{ include "pdtrim.secretVariable" (dict
  "name" "AWS_SECRET_ACCESS_KEY" "secret" $store
  "key" ($bundled.store.enabled | ternary "AWS_SECRET_ACCESS_KEY" .Values.store.secretAccessKeyKey)) }}
{{- end }}
{{- with .Values.hub.existingSecret }}
{{ include "pdtrim.secretVariable" (dict "name" "HF_TOKEN" "secret" . "key" $.Values.hub.key) }}
{{- end }}
{{- end }}

{{/* What the pods that reconcile need beyond that. */}}
{{- define "pdtrim.publishingVariables" -}}
{{- with .Values.hub.pushSecret }}
{{ include "pdtrim.secretVariable" (dict "name" "PDTRIM_HUB_PUSH_TOKEN" "secret" . "key" $.Values.hub.pushKey) }}
{{- end }}
{{- end }}

{{/* The restricted pod security standard. Takes {root, user, group}; the latter two only for what is bundled. */}}
{{- define "pdtrim.podSecurityContext" -}}
runAsNonRoot: true
{{- with default .root.Values.security.runAsUser .user }}
runAsUser: {{ . }}
{{- end }}
{{- with default .root.Values.security.fsGroup .group }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "pdtrim.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/*
How pods begin. Kubernetes would add variables for every Service, and one for a Service called `pdtrim` is PDTRIM_PORT:
hence no links. Takes {root, pod}.
*/}}
{{- define "pdtrim.podStart" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "pdtrim.podSecurityContext" . | nindent 2 }}
{{- end }}

{{/* Takes {root, pod, component, pool}. */}}
{{- define "pdtrim.podMetadata" -}}
annotations:
  checksum/settings: {{ include "pdtrim.settings" .root | sha256sum }}
  {{- with .pod.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
labels:
  {{- include "pdtrim.labels" . | nindent 2 }}
  {{- with .pod.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Takes {root, pod, component, pool}. */}}
{{- define "pdtrim.topologySpread" -}}
{{- $selector := include "pdtrim.selector" . | fromYaml -}}
{{- range .pod.topologySpreadConstraints }}
- {{ toYaml (merge (dict "labelSelector" (dict "matchLabels" $selector) "matchLabelKeys" (list "pod-template-hash")) .) | nindent 2 | trim }}
{{- end }}
{{- end }}

{{/* The pools, each with what it leaves to `worker`. */}}
{{- define "pdtrim.pools" -}}
{{- range $name, $pool := .Values.pools }}
{{- if kindIs "map" $pool }}
{{ $name }}: {{ mergeOverwrite (deepCopy $.Values.worker) $pool | toJson }}
{{- end }}
{{- end }}
{{- end }}

{{/* Every queue that some pool takes, as a JSON list that begins with the one for jobs that name none. */}}
{{- define "pdtrim.queues" -}}
{{- $queues := list -}}
{{- range $name, $pool := include "pdtrim.pools" . | fromYaml -}}
{{- $queues = concat $queues $pool.queues -}}
{{- end -}}
{{- prepend (without ($queues | uniq | sortAlpha) .Values.defaultQueue) .Values.defaultQueue | toJson -}}
{{- end }}
